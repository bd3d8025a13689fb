"""Biases of quantised layers, corrected by what the float model gives."""
