"""The machine: plan, run, commit, publish, report. It knows no task kind by name."""

__version__ = "0.1.0"
