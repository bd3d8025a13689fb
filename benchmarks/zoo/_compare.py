"""Comparisons of outputs, gradients and state; each raises Mismatch with the worst name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "GradientMismatch",
    "Mismatch",
    "compare_gradients",
    "compare_state",
    "compare_values",
    "tensors",
]

_VALUES = 1e-5
_GRADIENTS = 1e-4
_NEGLIGIBLE = 1e-5


class Mismatch(Exception):
    """Two things that should be equal are not; the message says which and by how much."""


class GradientMismatch(Mismatch):
    """Outputs are equal and a gradient is not: a wrong graph, or rounding that grew."""


def tensors(value: Any, path: str = "out") -> dict[str, Tensor]:
    """Flatten an output to its tensors by path: tuples, lists, mappings, dataclasses."""
    if isinstance(value, Tensor):
        return {path: value}
    if isinstance(value, Mapping):
        children = [(str(key), child) for key, child in value.items()]
    elif isinstance(value, (tuple, list)):
        children = [(str(index), child) for index, child in enumerate(value)]
    elif dataclasses.is_dataclass(value):
        children = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    else:
        return {}
    found: dict[str, Tensor] = {}
    for key, child in children:
        found |= tensors(child, f"{path}.{key}")
    return found


def compare_values(expected: dict[str, Tensor], actual: dict[str, Tensor], what: str) -> float:
    """Compare by name; return the worst error relative to the expected tensor's range."""
    if list(expected) != list(actual):
        raise Mismatch(f"{what}: names {list(actual)[:6]} instead of {list(expected)[:6]}")
    worst = 0.0
    for name, value in expected.items():
        error = _relative_error(value, actual[name], f"{what} {name}")
        if error > _VALUES:
            raise Mismatch(f"{what} {name}: off by {error:.2g} of its range")
        worst = max(worst, error)
    return worst


def compare_state(expected: nn.Module, actual: nn.Module) -> None:
    """Compare the buffers of two modules by name, where both have them."""
    theirs = dict(actual.named_buffers())
    for name, value in expected.named_buffers():
        if name in theirs:
            error = _relative_error(value, theirs[name], f"buffer {name}")
            if error > _VALUES:
                raise Mismatch(f"buffer {name} after one step: off by {error:.2g} of its range")


def compare_gradients(expected: nn.Module, actual: nn.Module) -> None:
    """Compare the gradients of every parameter; a parameter that got none must get none."""
    ours, theirs = _gradients(expected), _gradients(actual)
    parameters = dict(actual.named_parameters(remove_duplicate=False))
    largest = max((g.abs().max().item() for g in ours.values()), default=0.0)
    for name, gradient in ours.items():
        if name not in theirs:
            state = "gets no gradient" if name in parameters else "is not in the program"
            raise Mismatch(f"parameter {name} {state}")
        error = (gradient - theirs[name]).abs().max().item()
        allowed = max(_GRADIENTS * gradient.abs().max().item(), _NEGLIGIBLE * largest)
        if not error <= allowed:
            scale = gradient.abs().max().item()
            raise GradientMismatch(
                f"gradient of {name}: off by {error:.2g}, its largest is {scale:.2g}"
            )
    extra = sorted(set(theirs) - set(ours))
    if extra:
        raise Mismatch(f"parameter {extra[0]} gets a gradient that eager does not give it")


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    named = module.named_parameters(remove_duplicate=False)
    return {name: p.grad for name, p in named if p.grad is not None and bool(p.grad.any())}


def _relative_error(expected: Tensor, actual: Tensor, what: str) -> float:
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        raise Mismatch(
            f"{what}: {actual.dtype} {tuple(actual.shape)} instead of"
            f" {expected.dtype} {tuple(expected.shape)}"
        )
    if expected.numel() == 0:
        return 0.0
    if not expected.is_floating_point() and not expected.is_complex():
        return 0.0 if torch.equal(expected, actual) else float("inf")
    error = (expected.double() - actual.double()).abs().max().item()
    extent = (expected.max() - expected.min()).item() or expected.abs().max().item() or 1.0
    return error / extent if error == error else float("inf")
