"""Choose ranks: given ones, by energy, or the best within a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import Tensor

from fxcompress.errors import SelectorError, UsageError
from fxcompress.pipeline._close import did_you_mean
from passes._choices.budget import Ladder, steps, within_budget

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from passes.factorize._svd.layers import Layer
    from passes.factorize.svd import SvdOptions

__all__ = ["Cut", "break_even", "given_ranks", "share"]


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
    ladders = [
        Ladder(
            costs={
                "parameters": [float(layer.parameters(rank)) for rank in row],
                "macs": [float(layer.work(rank)) for rank in row],
            },
            losses=[0.0 if rank is None else losses(layer, rank) for rank in row],
            whole={"parameters": layer.parameters(None), "macs": layer.macs},
        )
        for layer, row in zip(layers, choices, strict=True)
    ]
    what = f"ranks of {options.round_to}"
    picked = within_budget(program, ladders, options.budget, what)
    return {
        layer.path: row[place] for layer, row, place in zip(layers, choices, picked, strict=True)
    }


def _choices(layer: Layer, multiple: int, given: Mapping[str, int]) -> list[int | None]:
    if layer.path in given:
        return [given[layer.path]]
    return [*steps(break_even(layer, multiple), multiple), None]
