"""Factors per channel that one layer takes from another without changing what a model computes."""
