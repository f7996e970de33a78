"""How the demo model was made: a small English-Korean world, what to learn in it, the training."""
