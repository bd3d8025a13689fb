"""Mixtures of experts measured."""
