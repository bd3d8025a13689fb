"""Convolutions as chains of thinner ones: what `tucker`, `cp` and `depthwise` have in common."""
