"""Rewrites that prepare a graph: fold, replace, cast."""
