"""The numbers that stand for a tensor in a golden text, and when two of them agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fxcompress.ir._format import number

__all__ = ["Numbers", "heads_agree"]

_DIGITS = 6
_HEAD_DIGITS = 4
_HEAD = 8


@dataclass(frozen=True)
class Numbers:
    """Mean, population standard deviation, largest magnitude, position-weighted mean, zeros.

    The position-weighted mean, `Σ xᵢ · (i + 1) / n²` over the flattened tensor, tells apart what a
    permutation of the elements leaves equal.
    """

    mean: float
    std: float
    absmax: float
    pos: float
    zeros: int
    count: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Numbers:
        """Return the numbers of a tensor, computed in double precision."""
        flat = tensor.detach().reshape(-1)
        values = (torch.view_as_real(flat) if flat.is_complex() else flat).to(torch.float64)
        values = values.reshape(-1).cpu()
        count = values.numel()
        if count == 0:
            return cls(0.0, 0.0, 0.0, 0.0, 0, 0)
        weights = torch.arange(1, count + 1, dtype=torch.float64) / count
        return cls(
            mean=values.mean().item(),
            std=values.std(correction=0).item(),
            absmax=values.abs().max().item(),
            pos=torch.dot(values, weights).item() / count,
            zeros=int((values == 0).sum().item()),
            count=count,
        )

    @staticmethod
    def head(tensor: torch.Tensor) -> tuple[str, ...]:
        """Return the first values of a tensor to 4 digits."""
        flat = tensor.detach().reshape(-1)[:_HEAD]
        flat = torch.view_as_real(flat).reshape(-1)[:_HEAD] if flat.is_complex() else flat
        return tuple(number(float(value), _HEAD_DIGITS) for value in flat.cpu().tolist())

    @classmethod
    def parse(cls, fields: Sequence[str]) -> Numbers:
        """Return the numbers of `mean=… std=… absmax=… pos=… zeros=3/288`.

        Raises:
            ValueError: A field is missing or no number.
        """
        given = dict(field.split("=", 1) for field in fields)
        if set(given) != {"mean", "std", "absmax", "pos", "zeros"}:
            raise ValueError(f"unexpected fields {sorted(given)}")
        zeros, count = given["zeros"].split("/")
        mean, std, absmax, pos = (float(given[k]) for k in ("mean", "std", "absmax", "pos"))
        return cls(mean, std, absmax, pos, int(zeros), int(count))

    def __str__(self) -> str:
        shown = [
            f"{name}={number(getattr(self, name), _DIGITS)}"
            for name in ("mean", "std", "absmax", "pos")
        ]
        return " ".join([*shown, f"zeros={self.zeros}/{self.count}"])

    def agrees(self, other: Numbers, tolerance: float) -> bool:
        """Whether two tensors' numbers differ by at most `tolerance` of the larger magnitude."""
        if self.count != other.count:
            return False
        if abs(self.zeros - other.zeros) > tolerance * self.count:
            return False
        return self.distance(other) <= tolerance

    def distance(self, other: Numbers) -> float:
        """Return the largest difference of a number, as a part of the larger magnitude."""
        pairs = [
            (getattr(self, name), getattr(other, name)) for name in ("mean", "std", "absmax", "pos")
        ]
        if any((a != a) != (b != b) for a, b in pairs):
            return float("inf")
        gap = max((abs(a - b) for a, b in pairs if a == a and a != b), default=0.0)
        scale = max(self.absmax, other.absmax)
        return 0.0 if gap == 0 else gap / scale if scale > 0 else float("inf")


def heads_agree(a: Sequence[str], b: Sequence[str], tolerance: float, absmax: float) -> bool:
    """Whether two heads differ by at most `tolerance` of `absmax`, rounding apart."""
    if len(a) != len(b):
        return False
    for left, right in zip(a, b, strict=True):
        if left == right:
            continue
        rounding = 10.0 ** -(_HEAD_DIGITS - 1) * max(abs(float(left)), abs(float(right)))
        if not abs(float(left) - float(right)) <= tolerance * absmax + rounding:
            return False
    return True
