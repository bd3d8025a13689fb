"""A second input for the check: other values, and other sizes wherever they may vary."""

from __future__ import annotations

from collections.abc import Mapping

import sympy
import torch

from fxcompress.ir._recorder._inputs import BoundCall
from fxcompress.ir._recorder._sizes import Guard
from fxcompress.ir.signature import Dim

__all__ = ["other_sizes", "probe_inputs"]


def other_sizes(dims: Mapping[str, Dim], guards: list[Guard]) -> dict[str, int]:
    """Return another size than the example's for each dynamic size, that no guard forbids.

    Where there is none nearby the example's size is kept.
    """
    chosen = {name: dim.example for name, dim in dims.items()}
    for name, dim in dims.items():
        for candidate in _candidates(dim):
            trial = {**chosen, name: candidate}
            if _allowed(trial, dims, guards):
                chosen = trial
                break
    return chosen


def _candidates(dim: Dim) -> list[int]:
    n = dim.example
    if dim.name == "batch":
        tried = [3 if n == 2 else 2, n + 1]
    else:
        tried = [
            n - 1,
            n + 1,
            n - 2,
            n + 2,
            n // 2,
            n * 2,
            *(n + s for s in (4, 8, 14, 16, 32, 64)),
        ]
    return [size for size in tried if size >= dim.minimum and size != n]


def _allowed(sizes: Mapping[str, int], dims: Mapping[str, Dim], guards: list[Guard]) -> bool:
    values = {dims[name].symbol: size for name, size in sizes.items()}
    for guard in guards:
        free = guard.expression.free_symbols
        if not all(str(symbol) in values for symbol in free):
            continue
        held = guard.expression.xreplace({s: sympy.Integer(values[str(s)]) for s in free})
        if held == sympy.false:
            return False
    return True


def probe_inputs(
    call: BoundCall, sizes: Mapping[str, int], *, masked: bool, seed: int = 1
) -> list[torch.Tensor]:
    """Return random tensors like the examples.

    Integers are drawn from the values of the example. With `masked`, a mask that is all ones in the
    example gets zeros at the end of its rows, so that a mask that was lost shows.
    """
    generator = torch.Generator().manual_seed(seed)
    return [
        _like(example, tensor.size(sizes), generator, masked)
        for tensor, example in zip(call.inputs, call.examples, strict=True)
    ]


def _like(
    example: torch.Tensor, shape: tuple[int, ...], generator: torch.Generator, masked: bool
) -> torch.Tensor:
    if example.is_floating_point() or example.is_complex():
        values = torch.randn(shape, generator=generator, dtype=torch.float32)
        finite = example.detach().float() if not example.is_complex() else example.detach().abs()
        low, high = float(finite.min()), float(finite.max())
        if low >= 0.0:
            # Positive inputs (probabilities, lengths in seconds, masks) stay in their range.
            values = torch.rand(shape, generator=generator) * (high - low) + low
        else:
            values = values * float(finite.std(correction=0))
        return values.to(example.dtype).to(example.device)
    if masked and len(shape) == 2 and bool((example == 1).all()):
        return _padding(shape).to(example.dtype).to(example.device)
    flat = example.detach().flatten().cpu()
    if not flat.numel():
        return torch.zeros(shape, dtype=example.dtype, device=example.device)
    picks = torch.randint(len(flat), shape, generator=generator)
    return flat[picks].to(example.device)


def _padding(shape: tuple[int, ...]) -> torch.Tensor:
    rows, length = shape
    kept = torch.tensor([max(1, length - 2 * row) for row in range(rows)])
    return torch.arange(length)[None] < kept[:, None]
