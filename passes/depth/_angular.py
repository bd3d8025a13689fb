"""Angular distances between the hidden states of a stack of blocks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxcompress.errors import NumericsError
from passes._observe import observe
from passes.depth._blocks import Region, ends
from passes.depth._influence import last_tokens
from passes.depth._scores import all_of, mask_of

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context

__all__ = ["distances"]


class _Chain:
    """The states of blocks of which each reads what the one before makes, one batch at a time."""

    def __init__(self, blocks: Sequence[Region]) -> None:
        entries = [(ends(region)[0], region) for region in blocks]
        self.places = [*entries, (ends(blocks[-1])[1], blocks[-1])]
        self.states: list[Tensor] = []
        self.mask: Tensor | None = None
        self.angles = torch.zeros(len(self.places), len(self.places), dtype=torch.float64)
        self.samples = 0

    def weigh(self, mask: Tensor) -> None:
        """Take the attention mask of a batch, `[batch, seq]`."""
        self.mask = mask

    def take(self, region: Region, state: Tensor) -> None:
        """Take the next state; after the last one, add up the angles."""
        self.states.append(F.normalize(last_tokens(state, region, self.mask), dim=-1))
        if len(self.states) == len(self.places):
            unit = torch.stack(self.states)
            cosines = torch.einsum("ibd,jbd->ijb", unit, unit).clamp(-1.0, 1.0)
            self.angles += torch.arccos(cosines).sum(-1).cpu()
            self.samples += unit.shape[1]
            self.states = []

    def distances(self) -> Tensor:
        """Return the mean angles over π."""
        found = self.angles / (math.pi * max(self.samples, 1))
        if not bool(found.isfinite().all()):
            path = self.places[0][1].path
            raise NumericsError(
                f"a NaN or an infinity in a hidden state from {path} on",
                hint="check the data and the weights",
                where=path,
            )
        return found


def distances(
    program: Program, chains: Sequence[Sequence[Region]], samples: int, context: Context
) -> list[Tensor]:
    """Return, for each chain of blocks, the angular distance of any two of its states.

    d = arccos(cos(h_i, h_j)) / π, 0 to 1, the mean over samples; of tokens the last one that is no
    padding, of images all. The cosine is clamped, since rounding takes it beyond 1.

    Args:
        program: The model.
        chains: Blocks of which each reads what the one before makes.
        samples: Of the calibration split.
        context: Holds the data.

    Returns:
        `[states, states]` for each chain; state i is what its block i reads, the last one what its
        last block makes.

    Raises:
        DataError: The calibration split is missing or too small.
        NumericsError: A state holds a NaN or an infinity.
    """
    made = [_Chain(blocks) for blocks in chains]
    observers: dict[fx.Node, list[Callable[[Any], None]]] = defaultdict(list)
    mask = mask_of(program)
    for chain in made:
        if mask is not None:
            observers[mask].append(chain.weigh)
        for node, region in chain.places:
            observers[node].append(partial(chain.take, region))
    batches = context.samples("calibration", samples)
    observe(program, batches, {node: all_of(each) for node, each in observers.items()})
    return [chain.distances() for chain in made]
