"""Zeros in weights: where they may go, which they are, the orders of channels, and the masks."""
