"""What is left of models with fewer blocks, or with shared ones."""
