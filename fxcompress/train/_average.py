"""The moving average of a training's weights, which is often better than its last weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fxcompress.train._sharding import fill, kinds, like
from fxcompress.train.config import Average

__all__ = ["MovingAverage"]


class MovingAverage:
    """An exponential moving average of tensors: a ← d · a + (1 − d) · w after each step.

    With warm-up the t-th decay is min(d, t / (t + 9)), t from 1, so that the first steps, far from
    the goal, are soon forgotten. The average starts as the weights after the first step. Tensors
    that are no floating point (counters) are not averaged: the newest counts.

    Args:
        config: Decay and warm-up.
        tensors: What is averaged, by name: parameters that train, and buffers.
    """

    def __init__(self, config: Average, tensors: Mapping[str, Tensor]) -> None:
        self.config, self.tensors = config, dict(tensors)
        self.values: dict[str, Tensor] = {}
        self.updates = 0

    def decay(self) -> float:
        """Return the share of the average in the next one."""
        if not self.config.warmup:
            return self.config.decay
        return min(self.config.decay, self.updates / (self.updates + 9))

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        if not self.updates:
            self.values = {name: t.detach().clone() for name, t in self.tensors.items()}
        else:
            share = 1 - self.decay()
            floating = [name for name, t in self.tensors.items() if t.is_floating_point()]
            for names in kinds(floating, self.values.__getitem__):
                torch._foreach_lerp_(
                    [self.values[name] for name in names],
                    [self.tensors[name].detach() for name in names],
                    share,
                )
            for name in self.tensors.keys() - set(floating):
                self.values[name].copy_(self.tensors[name])
        self.updates += 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the module have the average meanwhile."""
        if not self.updates:
            yield
            return
        weights = {name: t.detach().clone() for name, t in self.tensors.items()}
        self.write()
        try:
            yield
        finally:
            fill(self.tensors, weights)

    def write(self) -> None:
        """Give the module the average for good."""
        fill(self.tensors, self.values)

    def state(self) -> dict[str, Any]:
        """Return all that a resumed training needs."""
        return {"updates": self.updates, "values": self.values}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""
        self.updates = state["updates"]
        self.values = {
            name: like(value.to(self.tensors[name].device), self.tensors[name])
            for name, value in state["values"].items()
        }
