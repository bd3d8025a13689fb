"""Weights of two and three levels: which ones, and how layers are put in the order they need."""
