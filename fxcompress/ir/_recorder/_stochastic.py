"""Recognise stochastic depth in any library's spelling, by what it does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fxcompress.ir._recorder._record import untouched_random_state
from fxcompress.ir.modules import is_stock
from fxcompress.nn.stochastic import StochasticDepth

__all__ = ["find_stochastic_leaves"]

_ROWS, _SEEDS = 16, (0, 1)


def find_stochastic_leaves(model: nn.Module) -> dict[str, StochasticDepth]:
    """Return, by qualified name, the stock module that each stochastic leaf of `model` equals.

    A stochastic leaf has no state and no children, returns its input in evaluation, and drops
    whole samples with the probability that one of its attributes holds. Whether it equals
    `StochasticDepth` is found by running both on a small tensor with the same seeds.
    """
    found: dict[str, StochasticDepth] = {}
    known: dict[tuple[Any, ...], StochasticDepth | None] = {}
    with untouched_random_state():
        for path, module in model.named_modules():
            probabilities = _probabilities(module)
            if not path or not probabilities:
                continue
            key = (type(module), tuple(sorted(map(str, _settings(module).items()))))
            if key not in known:
                known[key] = _equal_stock(module, probabilities)
            stock = known[key]
            if stock is not None:
                found[path] = stock
    return found


def _settings(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training"}


def _probabilities(module: nn.Module) -> list[float]:
    if is_stock(module) or module._parameters or module._buffers or module._modules:
        return []
    values = _settings(module).values()
    return [v for v in values if isinstance(v, float) and 0.0 < v < 1.0]


def _equal_stock(module: nn.Module, probabilities: list[float]) -> StochasticDepth | None:
    x = torch.arange(1.0, _ROWS * 6 + 1).reshape(_ROWS, 2, 3)
    was_training = module.training
    try:
        with torch.no_grad():
            module.eval()
            if not _equal(module(x), x):
                return None
            module.train()
            wanted = [_seeded(module, x, seed) for seed in _SEEDS]
            for candidate in _candidates(probabilities):
                if all(
                    _equal(_seeded(candidate, x, seed), value)
                    for seed, value in zip(_SEEDS, wanted, strict=True)
                ):
                    return candidate
    except Exception:
        # It takes other inputs than one tensor: whatever it is, it is not stochastic depth.
        return None
    finally:
        module.train(was_training)
    return None


def _candidates(probabilities: list[float]) -> Iterator[StochasticDepth]:
    for p in probabilities:
        for noise in ("bernoulli", "uniform"):
            for mode in ("row", "batch"):
                for scale in (True, False):
                    yield StochasticDepth(p, mode, scale, noise)


def _seeded(module: nn.Module, x: torch.Tensor, seed: int) -> Any:
    torch.manual_seed(seed)
    return module(x)


def _equal(left: Any, right: Any) -> bool:
    if not isinstance(left, torch.Tensor) or left.shape != right.shape:
        return False
    return bool(torch.allclose(left, right, rtol=1e-6, atol=0.0))
