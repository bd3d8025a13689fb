"""Fewer axes: channels, neurons, heads, experts; and fewer weights."""
