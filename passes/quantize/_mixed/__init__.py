"""Bits per layer: what each width costs and loses, and the integer programme over all layers."""
