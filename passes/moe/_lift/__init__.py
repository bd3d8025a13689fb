"""Mixtures of experts in any spelling: found by structure and a trial, and made into the leaf."""
