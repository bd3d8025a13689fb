"""Making up for removed channels: the layers that can, and the values that do it best."""
