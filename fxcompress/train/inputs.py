"""Inputs by description: names, sizes with dynamic dims, types, and values to make them of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["InputSpec", "example"]

_RANDINT = re.compile(r"randint\(\s*(-?\d+)\s*,\s*(-?\d+)\s*\)")


@dataclass(frozen=True)
class InputSpec:
    """One tensor input.

    Attributes:
        name: The parameter of `forward`.
        shape: A size, or the name of a dynamic dim.
        dtype: Type of the elements.
        values: `randn`, `rand`, `ones`, `zeros`, `mask`, `arange` or `randint(low, high)`; None
            means normal floats, `randint(0, 100)` integers and true bools.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype = torch.float32
    values: str | None = None

    @property
    def dims(self) -> dict[int, str]:
        """The dynamic dims: place -> name."""
        return {place: size for place, size in enumerate(self.shape) if isinstance(size, str)}

    def size(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape with its dynamic sizes filled in."""
        return tuple(dims[s] if isinstance(s, str) else s for s in self.shape)

    def mismatch(self, tensor: Tensor, dims: dict[str, int]) -> str:
        """Return what is wrong with a tensor given for this input, or an empty string.

        `dims` holds the dynamic sizes seen in the same batch so far, and is added to.
        """
        if tensor.dim() != len(self.shape):
            return f"{self.name} has {tensor.dim()} dims {tuple(tensor.shape)}, not {self.written}"
        for size, wanted in zip(tensor.shape, self.shape, strict=True):
            if isinstance(wanted, str):
                wanted = dims.setdefault(wanted, size)
            if size != wanted:
                return f"{self.name} is {tuple(tensor.shape)}, not {self.written}"
        if tensor.dtype.is_floating_point != self.dtype.is_floating_point:
            return f"{self.name} is {_short(tensor.dtype)}, not {_short(self.dtype)}"
        return ""

    @property
    def written(self) -> str:
        """The shape as a spec writes it: `[batch, 3, 224, 224]`."""
        return f"[{', '.join(map(str, self.shape))}]"


def example(spec: InputSpec, dims: Mapping[str, int], generator: torch.Generator) -> Tensor:
    """Return a tensor for an input: the same values for the same state of the generator.

    `mask` is ones with the last part of every second row zero, as padding looks; `arange` counts
    along the last dim, as positions do.
    """
    size = spec.size(dims)
    values = spec.values or _usual(spec.dtype)
    bounds = _RANDINT.fullmatch(values)
    if bounds is not None:
        made = torch.randint(int(bounds[1]), int(bounds[2]), size, generator=generator)
    elif values == "randn":
        made = torch.randn(size, generator=generator)
    elif values == "rand":
        made = torch.rand(size, generator=generator)
    elif values == "arange":
        made = torch.arange(size[-1] if size else 1).expand(size).clone()
    else:
        made = torch.full(size, 0.0 if values == "zeros" else 1.0)
        if values == "mask" and len(size) > 1:
            made[1::2, ..., size[-1] - size[-1] // 3 :] = 0
    return made.to(spec.dtype)


def _usual(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "randn"
    return "ones" if dtype == torch.bool else "randint(0, 100)"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
