"""Experiment tracking: a CSV file, Weights & Biases, or nothing."""
