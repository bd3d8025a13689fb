"""Cases of ops that make tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.axes.support import Case, Sizes, case, tokens

__all__ = ["CASES"]


def _sized(name: str, *more: Any, method: bool = False, random: bool = False) -> Case:
    def compute(x: Tensor, s: Sizes) -> Tensor:
        size = (5, s.b)
        made = getattr(x, name)(size, *more) if method else getattr(torch, name)(size, *more)
        return torch.where(x.isfinite(), x, made) if random else torch.relu(x * (made + 0.5))

    return case(name, lambda s: tokens(lambda x: compute(x, s), s))


def _like(name: str, *more: Any) -> Case:
    random = "rand" in name or "empty" in name

    def compute(x: Tensor) -> Tensor:
        made = getattr(torch, name)(x, *more)
        return torch.where(x.isfinite(), x, made) if random else x * (made + 0.5)

    return case(name, lambda s: tokens(compute, s))


def _positions(name: str, make: Any) -> Case:
    """What is made for the free axis freezes it."""
    return case(name, lambda s: tokens(lambda x: x * (make(s.b) + 0.5), s), freezes=True)


CASES: tuple[Case, ...] = (
    *(_sized(name) for name in ("zeros", "ones")),
    _sized("full", 0.7),
    *(_sized(name, random=True) for name in ("empty", "rand", "randn")),
    *(_sized(name, method=True) for name in ("new_zeros", "new_ones")),
    _sized("new_full", 0.7, method=True),
    _sized("new_empty", method=True, random=True),
    *(_like(name) for name in ("zeros_like", "ones_like", "empty_like", "rand_like",
                               "randn_like")),
    _like("full_like", 0.7),
    case("bernoulli", lambda s: tokens(
        lambda x: torch.where(x.isfinite(), x, torch.bernoulli(torch.sigmoid(x))), s)),
    _positions("arange", lambda n: torch.arange(n)),
    _positions("linspace", lambda n: torch.linspace(0, 1, n)),
    _positions("logspace", lambda n: torch.logspace(0, 1, n)),
    case("eye", lambda s: tokens(lambda x: x @ torch.eye(s.b), s), freezes=True),
    _positions("tril_indices", lambda n: torch.tril_indices(n, n)[:, :n].float().mean(0)),
    _positions("triu_indices", lambda n: torch.triu_indices(n, n)[:, :n].float().mean(0)),
    _positions("randint", lambda n: 0 * torch.randint(0, 4, (n,))),
    _positions("randperm", lambda n: 0 * torch.randperm(n)),
    _positions("hann_window", lambda n: torch.hann_window(n)),
    _positions("hamming_window", lambda n: torch.hamming_window(n)),
)  # fmt: skip
