"""Whether a choice is always one of the experts."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxcompress.ir.ops import bind, op_name
from passes.moe._lift.miss import NearMiss
from passes.moe._lift.regions import CHOICES
from passes.moe._lift.trial import Sizes, evaluate

__all__ = ["check_range"]


def check_range(indices: fx.Node, count: int) -> None:
    """Check that a choice never is a number that no expert has.

    A router may choose among more than there are experts: one more stands for "none of them".

    Raises:
        NearMiss: It may be, or cannot be tried.
    """
    for choice in _choices(indices):
        scores = bind(choice)["input"]
        dim = bind(choice).get("dim")
        sizes = Sizes()
        shape = sizes.shape(scores)
        place = (-1 if dim is None else int(dim)) % len(shape)
        for number in range(count, shape[place]):
            favoured = torch.zeros(shape)
            favoured.select(place, number).fill_(1.0)
            known = {scores: favoured.to(scores.meta["val"].dtype)}
            if bool((evaluate(indices, known, {}, sizes) >= count).any()):
                raise NearMiss(
                    f"its router chooses among {shape[place]}, and there are {count} experts",
                    choice,
                )


def _choices(indices: fx.Node) -> list[fx.Node]:
    """Return what chooses, through nodes that hold whole numbers."""
    found: list[fx.Node] = []
    seen, stack = {indices}, [indices]
    while stack:
        node = stack.pop()
        if op_name(node) in CHOICES:
            found.append(node)
            continue
        for each in node.all_input_nodes:
            value = each.meta.get("val")
            whole = isinstance(value, Tensor) and not value.is_floating_point()
            if each not in seen and (whole or isinstance(value, tuple | list)):
                seen.add(each)
                stack.append(each)
    return found
