"""Groups of blocks that share one set of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxcompress.errors import UsageError
from passes.depth._blocks import Region, find_regions
from passes.depth._share import check_alike
from passes.depth.share_layers import Group, ShareLayersDecision

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from passes.depth.share_layers import ShareLayersOptions

__all__ = ["at", "check_untied", "decide_shared"]


def decide_shared(program: Program, options: ShareLayersOptions) -> ShareLayersDecision:
    """Return the decision of `depth.share_layers`."""
    regions = find_regions(program, options.blocks)
    places: Iterable[Sequence[int]]
    if isinstance(options.groups, int):
        size = options.groups
        places = [range(len(regions))[i : i + size] for i in range(0, len(regions), size)]
    else:
        places = options.groups
    groups = [[at(regions, place).path for place in sorted(group)] for group in places]
    groups = [group for group in groups if len(group) > 1]
    check_alike(program, groups, {region.path: region for region in regions})
    check_untied(program, groups)
    state = program.state()
    saved = sum(
        tensor.numel()
        for group in groups
        for path in group[1:]
        for name, tensor in _tensors(state, path).items()
        if isinstance(tensor, torch.nn.Parameter)
    )
    return ShareLayersDecision(
        groups=tuple(
            Group(paths=tuple(group), distance=_distance(state, group)) for group in groups
        ),
        init=options.init,
        saved=saved,
    )


def at(regions: Sequence[Region], place: int) -> Region:
    """Return a block by its place.

    Raises:
        UsageError: There are not so many.
    """
    if place >= len(regions):
        raise UsageError(
            f"there is no block {place}",
            reason=f"the model has {len(regions)} blocks, {regions[0].path} being block 0",
        )
    return regions[place]


def _tensors(state: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """Return the tensors of a block by their names in it."""
    start = f"{path}."
    return {
        name.removeprefix(start): each for name, each in state.items() if name.startswith(start)
    }


def check_untied(program: Program, groups: Iterable[Sequence[str]]) -> None:
    """Check that no block's tensor is that of something outside it.

    Raises:
        UsageError: One is.
    """
    for group in groups:
        for path in group:
            for alias, name in program.ties.items():
                inside = [each.startswith(f"{path}.") for each in (alias, name)]
                if any(inside) and not all(inside):
                    raise UsageError(
                        f"{path} has tensors of its own no more",
                        reason=f"{alias} is {name}",
                        hint="leave it out of the groups",
                        where=path,
                    )


def _distance(state: Mapping[str, Tensor], group: Sequence[str]) -> float | None:
    """Return the largest relative distance of the blocks' tensors to the first one's."""
    first = _tensors(state, group[0])
    if any(tensor.is_meta for tensor in first.values()):
        return None
    size = sum(_energy(tensor) for tensor in first.values())
    found = []
    for path in group[1:]:  # masks are tensors too, and have no difference as they are
        other = _tensors(state, path)
        found.append(sum(_energy(other[name].double() - first[name].double()) for name in first))
    return float((max(found) / max(size, 1e-300)) ** 0.5)


def _energy(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().sum())
