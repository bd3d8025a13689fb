"""What `quantize.dynamic` decides and inserts."""
