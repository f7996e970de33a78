"""The demo model: a tiny translator, trained on this machine in about a minute, no network."""
