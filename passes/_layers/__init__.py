"""Layers as products: the weights they read, as matrices, and the inputs they multiply with."""
