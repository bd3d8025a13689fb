"""The recorder: runs a model once on fake tensors and writes what it calls into an FX graph."""
