"""Compare a pruned model with its masked reference, in double precision where the model allows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo import Inputs
from benchmarks.zoo._compare import tensors

from ._masked import Removed, masked_reference, run_masked

__all__ = ["TOLERANCE", "Verdict", "judge"]

TOLERANCE = 1e-4
"""Largest error of an output, in standard deviations of that output."""


@dataclass(frozen=True)
class Verdict:
    """Whether two models agree: the worst error in standard deviations, or why there is none."""

    error: float
    detail: str = ""

    @property
    def right(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= TOLERANCE


def judge(original: nn.Module, removed: Removed, pruned: nn.Module, inputs: Inputs) -> Verdict:
    """Run the pruned model and the masked original on `inputs`; the better reference counts.

    Double precision comes first. A model that computes a part in float32 whatever its weights are
    may do so in another place than its graph, and is then compared as it is.
    """
    try:
        exact = _double(original)
        if _finite(_evaluate(exact, _in_double(inputs))):  # fills chosen for float32 may overflow
            verdict = _compare(exact, removed, _double(pruned), _in_double(inputs))
            if verdict.right:
                return verdict
    except (RuntimeError, TypeError):
        pass  # constants made in float32, or a kernel without double precision
    return _compare(original, removed, pruned, inputs)


def _compare(original: nn.Module, removed: Removed, pruned: nn.Module, inputs: Inputs) -> Verdict:
    actual = _evaluate(pruned, inputs)
    reference = masked_reference(original, removed).eval()
    verdicts = []
    for everywhere in (False, True):
        expected = run_masked(
            reference, lambda: _evaluate(reference, inputs), everywhere=everywhere
        )
        verdicts.append(compare_outputs(expected, actual))
        if verdicts[-1].right:
            break
    return min(verdicts, key=lambda verdict: verdict.error)


def compare_outputs(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> Verdict:
    """Compare outputs by place; an output that shrank is compared where the reference is alive."""
    if list(expected) != list(actual):
        return Verdict(float("inf"), f"outputs {list(actual)[:4]} instead of {list(expected)[:4]}")
    worst = 0.0
    for name, value in expected.items():
        other = actual[name]
        if value.shape != other.shape:
            shrunk = _alive(value, other)
            if shrunk is None:
                shapes = f"{tuple(other.shape)} instead of {tuple(value.shape)}"
                return Verdict(float("inf"), f"{name} is {shapes}")
            value = shrunk
        if not value.is_floating_point():
            continue
        error = (value.double() - other.double()).abs().max().item() if value.numel() else 0.0
        scale = value.double().std().item() if value.numel() > 1 else value.abs().max().item()
        relative = error / max(scale, 1e-30)
        worst = max(worst, relative if relative == relative else float("inf"))
    return Verdict(worst, "" if worst <= TOLERANCE else f"off by {worst:.2g} standard deviations")


def _alive(value: Tensor, other: Tensor) -> Tensor | None:
    """Drop what is zero along each dimension in which the pruned output is smaller."""
    if value.ndim != other.ndim:
        return None
    for dim, (size, smaller) in enumerate(zip(value.shape, other.shape, strict=True)):
        if size != smaller:
            kept = (value != 0).transpose(dim, -1).reshape(-1, size).any(0).nonzero().flatten()
            if len(kept) != smaller:
                return None
            value = value.index_select(dim, kept)
    return value


def _evaluate(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    args, kwargs = inputs
    with torch.no_grad():
        return tensors(model.eval()(*args, **kwargs))


def _finite(outputs: dict[str, Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in outputs.values())


def _double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def _in_double(inputs: Inputs) -> Inputs:
    convert: Callable[[Any], Any] = lambda v: (  # noqa: E731
        v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
    )
    args, kwargs = inputs
    return tuple(map(convert, args)), {name: convert(value) for name, value in kwargs.items()}
