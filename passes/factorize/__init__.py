"""Weights as products of smaller ones."""
