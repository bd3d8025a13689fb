"""Choose ranks: given ones, by energy, or the best within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

from torch import Tensor

from fxcompress.analysis.cost import cost
from fxcompress.errors import SelectorError, UsageError
from fxcompress.pipeline._close import did_you_mean
from passes._choices.programme import Problem, solve

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from passes.factorize._svd.layers import Layer
    from passes.factorize.svd import SvdOptions

__all__ = ["Cut", "break_even", "given_ranks", "share"]

_CHOICES: Final = 24
"""Ranks of each layer that a budget chooses from."""

_GAP: Final = 1e-4
"""How far from the least loss the solver may stop: spectra are known less well than that."""


@dataclass(frozen=True)
class Cut:
    """A layer's weight with less rank, as `passes._choices.outputs` measures it."""

    tensor: str
    readers: tuple[str, ...]
    choices: tuple[int, ...]
    truncated: Callable[[int], Tensor]

    def changed(self, choice: int) -> Tensor | None:
        """Return the weight at a rank."""
        return self.truncated(choice)


def break_even(layer: Layer, multiple: int) -> int:
    """Return the largest rank, a multiple, at which two layers have fewer weights; 0 if none."""
    most = (layer.out * layer.columns - 1) // (layer.out + layer.columns)
    return most // multiple * multiple


def given_ranks(layers: Sequence[Layer], options: SvdOptions) -> dict[str, int]:
    """Return path -> rank for the layers that `ranks` names.

    Raises:
        SelectorError: A glob fits no layer.
        UsageError: A rank is above full rank.
    """
    found: dict[str, int] = {}
    paths = [layer.path for layer in layers]
    for glob in options.ranks:
        if not any(fnmatchcase(path, glob) for path in paths):
            raise SelectorError(
                f"`{glob}` in `ranks` matches no selected layer",
                hint=did_you_mean(glob, paths, kind="selected are"),
            )
    for layer in layers:
        fits = [rank for glob, rank in options.ranks.items() if fnmatchcase(layer.path, glob)]
        if not fits:
            continue
        if fits[0] > layer.full:
            raise UsageError(
                f"rank {fits[0]} of {layer.path} is above its full rank {layer.full}",
                reason=f"as a matrix its weight is {layer.out} x {layer.columns}",
                hint=f"give at most {layer.full}; less than "
                f"{break_even(layer, 1) + 1} saves parameters",
                where=layer.path,
            )
        found[layer.path] = fits[0]
    return found


def share(
    program: Program,
    layers: Sequence[Layer],
    options: SvdOptions,
    given: Mapping[str, int],
    losses: Callable[[Layer, int], float],
) -> dict[str, int | None]:
    """Return path -> rank, None for whole, that lose least within the budget.

    Args:
        program: The model.
        layers: Those that may have less rank.
        options: Hold the budget.
        given: Ranks that are fixed.
        losses: What the model loses where a layer has a rank.

    Raises:
        UsageError: The budget cannot be met.
    """
    assert options.budget is not None, "there is a budget"
    choices = [_choices(layer, options.round_to, given) for layer in layers]
    costs = {
        "parameters": [
            [float(layer.parameters(rank)) for rank in row]
            for layer, row in zip(layers, choices, strict=True)
        ],
        "macs": [
            [float(layer.work(rank)) for rank in row]
            for layer, row in zip(layers, choices, strict=True)
        ],
        "loss": [
            [0.0 if rank is None else losses(layer, rank) for rank in row]
            for layer, row in zip(layers, choices, strict=True)
        ],
    }
    limits = _limits(program, layers, options, Problem(costs, "loss", {}))
    picked = solve(Problem(costs, "loss", limits), gap=_GAP)
    if picked is None:
        raise UsageError(
            "no ranks keep the budget",
            reason="each limit alone can be met, all of them together cannot",
            hint="raise one of them",
        )
    return {
        layer.path: row[place] for layer, row, place in zip(layers, choices, picked, strict=True)
    }


def _choices(layer: Layer, multiple: int, given: Mapping[str, int]) -> list[int | None]:
    if layer.path in given:
        return [given[layer.path]]
    most = break_even(layer, multiple) // multiple
    steps = min(_CHOICES, most)
    ranks = {max(1, round(most * (step + 1) / steps)) * multiple for step in range(steps)}
    return [*sorted(ranks), None]


def _limits(
    program: Program, layers: Sequence[Layer], options: SvdOptions, problem: Problem
) -> dict[str, float]:
    """Return what the layers together may cost."""
    assert options.budget is not None, "there is a budget"
    whole = cost(program)
    now = {"parameters": whole.parameters, "macs": whole.macs}
    taken = {
        "parameters": sum(layer.parameters(None) for layer in layers),
        "macs": sum(layer.macs for layer in layers),
    }
    limits = {}
    for name, amount in options.budget.costs.items():
        rest = now[name] - taken[name]
        limit = amount.of(now[name]) - rest
        least = problem.least(name)
        if least > limit:
            reachable = math.ceil(least + rest)
            raise UsageError(
                f"{amount} of {name} cannot be met",
                reason=f"the least that ranks of {options.round_to} reach is {reachable:,} "
                f"({reachable / max(now[name], 1):.1%}); {rest:,} belong to nothing that is "
                "selected",
                hint=f"give at least {reachable}, or select more layers",
            )
        limits[name] = limit
    return limits
