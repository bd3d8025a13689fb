"""Losses on routers: an even load, and small logits."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from fxcompress.errors import DataError, UsageError
from fxcompress.train import loss_config as config
from fxcompress.train.losses._outcome import Outcome, Total
from fxcompress.train.losses._rows import attention_mask, wide
from fxcompress.train.losses._taps import mean_over_taps

__all__ = ["load_balance", "router_z"]

_PREFIX: Final = "router_"


def load_balance(options: config.LoadBalance, outcome: Outcome, progress: float) -> Total:
    """Return N · Σ_i f_i · P_i, times the number of tokens, for routers of N experts.

    f_i is the part of the tokens' choices that expert i has (of their `top_k` likeliest experts),
    P_i the mean of its probability; the gradient is that of P (Fedus et al., 2021, "Switch
    Transformers", arXiv:2101.03961, equations 4 to 6). Padding of `attention_mask` does not count.

    Raises:
        UsageError: There is no router, or none of a name; or it has fewer experts than `top_k`.
    """
    totals: list[Total] = []
    for name, logits in _routers(options, outcome).items():
        experts = logits.shape[1]
        if options.top_k > experts:
            raise UsageError(
                f"the loss load_balance counts {options.top_k} experts of a token",
                reason=f"the router of tap {name} chooses among {experts}",
                where=name,
            )
        chances = logits.softmax(-1)
        chosen = chances.topk(options.top_k, -1).indices
        # A sum of ones, where counting numbers would end the graph on some devices.
        load = torch.zeros_like(chances).scatter_(1, chosen, 1.0).sum(0)
        share = load / max(len(logits) * options.top_k, 1)
        mean = chances.sum(0) / max(len(logits), 1)
        totals.append((experts * (share * mean).sum() * len(logits), len(logits)))
    return mean_over_taps(totals)


def router_z(options: config.RouterZ, outcome: Outcome, progress: float) -> Total:
    """Return (log Σ_i exp z_i)² summed over tokens.

    Zoph et al., 2022, "ST-MoE", arXiv:2202.08906, equation 5. Padding of `attention_mask` does not
    count.

    Raises:
        UsageError: There is no router, or none of a name.
    """
    return mean_over_taps(
        [
            (logits.logsumexp(-1).square().sum(), len(logits))
            for logits in _routers(options, outcome).values()
        ]
    )


def _routers(options: config.LoadBalance | config.RouterZ, outcome: Outcome) -> dict[str, Tensor]:
    """Return the logits `[tokens, experts]` that count of each router, by its tap's name."""
    known = outcome.raw_taps or outcome.taps
    names = options.taps or tuple(name for name in known if name.startswith(_PREFIX))
    for name in names:
        if name not in known:
            raise UsageError(
                f"the loss {options.use} reads a tap {name} that is not there",
                reason=f"there are {', '.join(known) or 'none'}",
                where=name,
            )
    if not names:
        raise UsageError(
            f"the loss {options.use} reads routers, and there are none",
            reason="no tap is called `router_…`",
            hint="put `use: moe.upcycle` before the training, or name `taps`",
        )
    return {name: _counted(known[name], outcome, name) for name in names}


def _counted(logits: Tensor, outcome: Outcome, name: str) -> Tensor:
    """Return `[tokens, experts]` without padding."""
    if logits.dim() < 2:
        raise DataError(f"the tap {name} is no router's logits", reason="they are [..., experts]")
    rows, mask = wide(logits).flatten(0, -2), attention_mask(outcome.batch)
    return rows[mask.flatten() != 0] if mask is not None and mask.numel() == len(rows) else rows
