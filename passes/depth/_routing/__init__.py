"""Mixture of depths: which blocks can be routed, their routers, and the rewrite."""
