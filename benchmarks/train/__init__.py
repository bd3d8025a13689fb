"""Measurements of training and distillation."""
