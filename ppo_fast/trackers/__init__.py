"""Trackers of runs: TensorBoard, Weights & Biases and others, through accelerate."""
