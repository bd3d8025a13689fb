"""What `quantize.weight_only` is made of: which weights, their grids, and how they are rounded."""
