"""Structured pruning measured against Torch-Pruning: coverage, quality and speed."""
