"""Training: the weights change, the graph does not."""
