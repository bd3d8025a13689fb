"""How far one set of outputs is from another."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch.utils import _pytree as pytree

__all__ = ["OutputComparison", "compare"]


class OutputComparison(BaseModel):
    """Differences over all floating-point outputs together.

    Attributes:
        max_abs: max |Δ|, in the unit of the outputs.
        relative: The largest max |Δ| / range(y) of any one output, range being max y − min y
            (max |y| where an output is constant).
        cosine: Cosine of the two outputs, flattened; 1 where both are zero.
        sqnr_db: Signal to quantisation noise, 10 log10(Σ y² / Σ Δ²), in dB; infinite when equal.
        outputs: The same for each output by its place in the tree (empty on the parts).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    max_abs: float
    relative: float
    cosine: float
    sqnr_db: float
    outputs: Mapping[str, "OutputComparison"] = {}

    @property
    def finite(self) -> bool:
        """Whether no NaN or infinity took part."""
        return math.isfinite(self.max_abs) and math.isfinite(self.cosine)


class _Sums:
    """Running sums of one comparison, so that outputs can be added up without joining them."""

    def __init__(self) -> None:
        self.signal = self.other = self.product = self.noise = self.max_abs = 0.0
        self.relative = 0.0

    def add(self, y: torch.Tensor, z: torch.Tensor) -> None:
        y, z = y.detach().to(torch.float64).flatten(), z.detach().to(torch.float64).flatten()
        if y.numel() == 0:
            return
        delta = _difference(y, z)
        keep = torch.isfinite(y) & torch.isfinite(z)
        y, z = torch.where(keep, y, 0.0), torch.where(keep, z, 0.0)
        largest = float(delta.abs().max())
        spread = float(y.max() - y.min()) or float(y.abs().max())
        relative = largest / spread if spread else (0.0 if largest == 0 else math.inf)
        self.max_abs = _larger(self.max_abs, largest)
        self.relative = _larger(self.relative, relative)
        self.signal += float(y @ y)
        self.other += float(z @ z)
        self.product += float(y @ z)
        self.noise += float(delta @ delta)

    def merge(self, other: "_Sums") -> None:
        self.max_abs = _larger(self.max_abs, other.max_abs)
        self.relative = _larger(self.relative, other.relative)
        for name in ("signal", "other", "product", "noise"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def result(self, outputs: Mapping[str, OutputComparison]) -> OutputComparison:
        norm = math.sqrt(self.signal) * math.sqrt(self.other)
        both_zero = self.signal == 0 and self.other == 0
        cosine = self.product / norm if norm else (1.0 if both_zero else 0.0)
        if math.isnan(self.noise):
            sqnr = math.nan
        elif self.noise == 0:
            sqnr = math.inf
        elif self.signal == 0 or math.isinf(self.noise):
            sqnr = -math.inf
        else:
            sqnr = 10 * (math.log10(self.signal) - math.log10(self.noise))
        return OutputComparison(
            max_abs=self.max_abs,
            relative=self.relative,
            cosine=min(1.0, cosine),
            sqnr_db=sqnr,
            outputs=outputs,
        )


def _larger(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def _difference(y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Z − y, where the same infinity (or NaN) on both sides is no difference."""
    same = (y == z) | (y.isnan() & z.isnan())
    return torch.where(same, 0.0, z - y)


def compare(reference: Any, candidate: Any) -> OutputComparison:
    """Compare two outputs of the same structure: tensors, or trees of tensors.

    Integer and boolean outputs are compared as numbers. Leaves that are no tensors must be equal.

    Raises:
        ValueError: The trees or the shapes differ.
    """
    left, tree = pytree.tree_flatten_with_path(reference)
    right, other_tree = pytree.tree_flatten(candidate)
    if len(left) != len(right):
        raise ValueError(f"outputs differ in structure: {tree} and {other_tree}")
    total, parts = _Sums(), {}
    for (path, y), z in zip(left, right, strict=True):
        name = pytree.keystr(path)
        if not isinstance(y, torch.Tensor) or not isinstance(z, torch.Tensor):
            if type(y) is not type(z) or y != z:
                raise ValueError(f"output {name or 'value'} differs: {y!r} and {z!r}")
            continue
        if y.shape != z.shape:
            raise ValueError(
                f"output {name or 'value'} differs in shape: {list(y.shape)} and {list(z.shape)}"
            )
        sums = _Sums()
        sums.add(y, z)
        total.merge(sums)
        parts[name] = sums.result({})
    return total.result(parts if len(parts) > 1 else {})
