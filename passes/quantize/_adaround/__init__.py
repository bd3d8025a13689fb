"""Learned rounding: which weights, in which units, and the search for up or down."""
