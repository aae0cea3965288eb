"""Training of reward models from preference pairs."""
