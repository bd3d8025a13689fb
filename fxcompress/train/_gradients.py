"""The gradients of one optimiser step: of one batch, or of several whose means are joined.

The loss of a step is Σ_t w_t · S_t / C_t: for each term t the sum over all that counts in the whole
step, by how much counts. A batch i gives the mean S_ti / C_ti, which enters with the share
C_ti / C_t. So padding and ignored targets weigh nothing, wherever they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxcompress.train._objective import PENALTY, Objective, Part, total_of
from fxcompress.train._precision import Precision
from fxcompress.train._sharding import kinds
from fxcompress.train._world import World
from fxcompress.train.hooks import Moment
from fxcompress.train.metrics import IGNORED, evaluating

__all__ = ["Gradients"]

Pieces = Sequence[tuple[Any, Any, bool]]
"""(batch, target, whether they count), on the device."""


class Gradients:
    """Adds up the gradients of a step.

    Args:
        objective: The losses.
        parameters: What gets the gradients.
        precision: How outputs are computed.
        world: The processes that share each batch.
    """

    def __init__(
        self,
        objective: Objective,
        parameters: Sequence[nn.Parameter],
        precision: Precision,
        world: World,
    ) -> None:
        self.objective, self.parameters = objective, tuple(parameters)
        self.precision, self.world = precision, world
        self.device = self.parameters[0].device

    def add(self, batches: Sequence[tuple[Any, Any]], moment: Moment) -> dict[str, float]:
        """Compute the gradients of the batches of a step; return its terms, their sum under "".

        The weights stay as they are: it is the caller who looks whether the sum is finite.
        """
        if len(batches) > 1 or not self.world.alone:
            pieces = [self.world.part_of(*each) for each in batches]
            return self._joined(pieces, moment)
        parts = self._parts(*batches[0], moment)
        total = total_of(parts)
        self.precision.backward(total)
        # Afterwards: a device still computes when this is asked for.
        found = {name: part.mean.item() for name, part in parts.items()}
        found[""] = total.item()
        return found

    def _parts(self, batch: Any, target: Any, moment: Moment) -> dict[str, Part]:
        batch, target = self._placed(batch), self._placed(target)
        with self.precision.computing():
            return self.objective.parts(batch, target, moment)

    def _placed(self, value: Any) -> Any:
        """Return a batch with its tensors on the device; a pytree would take longer to walk."""
        if isinstance(value, Tensor):
            return value.to(self.device, non_blocking=True)
        if type(value) is tuple:
            return tuple(map(self._placed, value))
        if type(value) is dict:
            return {key: self._placed(each) for key, each in value.items()}
        return pytree.tree_map_only(Tensor, lambda leaf: leaf.to(self.device), value)

    def _joined(self, pieces: Pieces, moment: Moment) -> dict[str, float]:
        """Add the gradients of batches as if they were one, over all processes.

        Counts are known where the batches are alike and nothing in them is masked. Elsewhere a
        single term is divided by its count at the end; several are counted first, without
        gradients.
        """
        alike = self.world.agree(len(pieces) == 1 or _alike(pieces))
        single = len(self.objective.terms) == 1
        totals = {} if alike or single else self._counted(pieces, moment)
        seen: dict[str, float] = defaultdict(float)
        found: dict[str, float] = defaultdict(float)
        factor = 1.0
        for place, (batch, target, counting) in enumerate(pieces):
            parts = self._parts(batch, target, moment)
            counts = _counts(parts, counting)
            if not totals:
                each = self.world.sum(counts)
                totals = {name: len(pieces) * count for name, count in each.items()}
            _add(counts, seen)
            last = place == len(pieces) - 1
            if last and single and not alike:
                ((name, count),) = self.world.sum(seen).items()
                factor = max(totals[name], 1.0) / max(count, 1.0)
            once = 1 / (self.world.size * factor) if last else 0.0
            shares = {
                name: counts[name] / max(totals[name], 1.0) if name in counts else once
                for name in parts
            }
            means = {name: shares[name] * float(p.mean.detach()) for name, p in parts.items()}
            _add(means, found)
            for loss in self._losses(parts, shares):
                _add({"": float(loss.detach())}, found)
                self.precision.backward(loss)
        self._finish(factor)
        return self.world.sum({name: value * factor for name, value in found.items()})

    def _losses(self, parts: Mapping[str, Part], shares: Mapping[str, float]) -> list[Tensor]:
        """Return what gradients are taken of, one after the other."""
        scaled = {name: _scaled(part, shares[name]) for name, part in parts.items()}
        # FSDP adds gradients up on a stream of its own: a penalty, which goes to the parts of
        # weights directly, comes when that is done.
        apart = scaled.pop(PENALTY, None) if self.world.sharded else None
        losses = [total_of(scaled)]
        if apart is not None and apart.mean.requires_grad:
            losses.append(total_of({PENALTY: apart}))
        return losses

    def _counted(self, pieces: Pieces, moment: Moment) -> dict[str, float]:
        """Return by how much each term is divided, from a pass without gradients."""
        seen: dict[str, float] = defaultdict(float)
        with torch.no_grad(), ExitStack() as stack:
            for model in self.objective.models:
                stack.enter_context(evaluating(model))
            for batch, target, counting in pieces:
                _add(_counts(self._parts(batch, target, moment), counting), seen)
        return self.world.sum(seen)

    def _finish(self, factor: float) -> None:
        """Scale the gradients, and add up those of all processes."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if factor != 1:
            for part in kinds(gradients, lambda gradient: gradient):
                torch._foreach_mul_(part, factor)
        self.world.add_gradients(self.parameters)


def _add(values: Mapping[str, float], to: dict[str, float]) -> None:
    for name, value in values.items():
        to[name] += value


def _counts(parts: Mapping[str, Part], counting: bool) -> dict[str, float]:
    return {
        name: float(part.count) if counting else 0.0
        for name, part in parts.items()
        if part.count is not None
    }


def _scaled(part: Part, share: float) -> Part:
    return replace(part, weight=part.weight * share)


def _alike(pieces: Pieces) -> bool:
    """Whether batches have the same shapes and nothing is masked: each term counts alike in all."""
    first, tree = pytree.tree_flatten(pieces[0][:2])
    shapes = [leaf.shape for leaf in first if isinstance(leaf, Tensor)]
    for batch, target, _ in pieces:
        leaves, other = pytree.tree_flatten((batch, target))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if other != tree or [leaf.shape for leaf in tensors] != shapes:
            return False
        if isinstance(mask, Tensor) and not bool((mask != 0).all()):
            return False
        if any(not leaf.is_floating_point() and (leaf == IGNORED).any() for leaf in tensors):
            return False
    return True
