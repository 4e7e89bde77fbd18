"""Benchmarks a user can run: training steps of any shape with random weights."""
