"""What an axis is to a tensor. Imports nothing heavy: options of passes name roles."""

from __future__ import annotations

from typing import Literal, TypeAlias

__all__ = ["Role"]

Role: TypeAlias = Literal["out", "in", "scale", "bias", "other"]
"""A layer's outputs, its inputs, a norm's scale, a bias, or anything else."""
