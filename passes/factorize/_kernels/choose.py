"""Which ranks each convolution gets: by a budget, or one that is worth it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias

from torch import Tensor

from fxcompress.rewrite.edits import Declined
from passes._choices.budget import Ladder, within_budget
from passes._choices.outputs import output_losses
from passes.factorize._kernels.layers import Kernel
from passes.factorize._kernels.model import KernelEntry, Part
from passes.factorize._svd.ranks import Cut

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes._budget import CostBudget

__all__ = ["Candidate", "Ranks", "cheaper", "measured", "shared", "whole"]

Ranks: TypeAlias = tuple[int, ...]

_MEASURED: Final = 8
"""Samples on which the outputs are compared, once for each convolution."""

_NOTHING: Final = 1e-12
"""Lost energy, of all, that is only rounding."""


@dataclass(frozen=True)
class Candidate:
    """A convolution and what it may become.

    Attributes:
        kernel: The convolution.
        choices: The ranks that a budget chooses from.
        parts: The chain at some ranks.
        lost: The part of its energy that ranks lose.
        approximate: The weight at some ranks, `[out, in, taps]`.
    """

    kernel: Kernel
    choices: tuple[Ranks, ...]
    parts: Callable[[Ranks], tuple[Part, ...]]
    lost: Callable[[Ranks], float]
    approximate: Callable[[Ranks], Tensor]


def cheaper(kernel: Kernel, parts: Iterable[Part]) -> bool:
    """Return whether a chain has fewer weights than the convolution."""
    return sum(part.parameters for part in parts) < kernel.parameters


def _macs(kernel: Kernel, parts: Sequence[Part]) -> float:
    """Return the multiply-accumulates of a chain; a first part of kernel 1 sees every input."""
    total = 0.0
    for place, part in enumerate(parts):
        first = place == 0 and set(part.kernel) == {1}
        total += part.parameters * kernel.work * (kernel.spread if first else 1.0)
    return total


def shared(
    program: Program,
    candidates: Sequence[Candidate],
    budget: CostBudget,
    given: Mapping[str, Ranks],
    scales: Mapping[str, float],
) -> dict[str, Ranks | None]:
    """Return path -> ranks, None for whole, that lose least within the budget.

    Args:
        program: The model.
        candidates: Its convolutions.
        budget: What the model may cost.
        given: Ranks that are fixed.
        scales: What the model loses for each part of a convolution's energy.

    Raises:
        UsageError: The budget cannot be met.
    """
    rows: list[list[Ranks | None]] = []
    ladders = []
    for each in candidates:
        kernel, fixed = each.kernel, given.get(each.kernel.name)
        row: list[Ranks | None] = [*each.choices, None] if fixed is None else [fixed]
        chains = [None if ranks is None else each.parts(ranks) for ranks in row]
        whole = {"parameters": float(kernel.parameters), "macs": float(kernel.layer.macs)}
        ladders.append(
            Ladder(
                costs={
                    "parameters": [
                        whole["parameters"] if c is None else float(sum(p.parameters for p in c))
                        for c in chains
                    ],
                    "macs": [whole["macs"] if c is None else _macs(kernel, c) for c in chains],
                },
                losses=[
                    0.0 if ranks is None else scales[kernel.name] * each.lost(ranks)
                    for ranks in row
                ],
                whole=whole,
            )
        )
        rows.append(row)
    picked = within_budget(program, ladders, budget, "ranks")
    return {
        each.kernel.name: row[place]
        for each, row, place in zip(candidates, rows, picked, strict=True)
    }


def measured(
    program: Program, candidates: Sequence[Candidate], calibration: int, context: Context
) -> dict[str, float]:
    """Return path -> noise over signal of the model's outputs for all of a convolution's energy.

    Measured with the ranks in the middle of the choices, one convolution at a time.

    Raises:
        DataError: The calibration split is missing or too small.
        NumericsError: The outputs are not finite.
    """
    state = program.state()
    cuts, lost = [], []
    for each in candidates:
        layer = each.kernel.layer
        choice = len(each.choices) // 2
        value = state[layer.weight.tensor]
        cut = partial(_changed, each, value)
        cuts.append(Cut(layer.weight.tensor, layer.nodes, (choice,) * bool(each.choices), cut))
        lost.append(each.lost(each.choices[choice]) if each.choices else 0.0)
    batches = context.samples("calibration", min(calibration, _MEASURED))
    noise = output_losses(program, cuts, batches, context, own=False)
    return {
        each.kernel.name: row[0] / gone if row and gone > _NOTHING else 0.0
        for each, row, gone in zip(candidates, noise, lost, strict=True)
    }


def _changed(candidate: Candidate, value: Tensor, choice: int) -> Tensor:
    made = candidate.approximate(candidate.choices[choice])
    return made.reshape(value.shape).to(value.dtype).to(value.device)


def whole(entries: Iterable[KernelEntry], reason: str) -> tuple[Declined, ...]:
    """Say why convolutions that were selected stay whole.

    Args:
        entries: All of them.
        reason: Why; `{weights}` is the number of its weights.
    """
    return tuple(
        Declined(node=node, reason=reason.format(weights=f"{entry.parameters[0]:,} weights"))
        for entry in entries
        if entry.ranks is None
        for node in entry.nodes
    )
