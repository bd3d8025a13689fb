"""Measurements of the quantizing passes."""
