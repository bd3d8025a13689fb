"""The loss of what predicts a router's choice."""

from __future__ import annotations

from typing import Final

import torch
from torch.nn import functional as F

from fxcompress.errors import UsageError
from fxcompress.train import loss_config as config
from fxcompress.train.losses._outcome import Outcome, Total
from fxcompress.train.losses._rows import attention_mask
from fxcompress.train.losses._taps import mean_over_taps

__all__ = ["routing"]

_PREFIX: Final = "route_"


def routing(options: config.Routing, outcome: Outcome, progress: float) -> Total:
    """Return −Σ t·log σ(p) + (1 − t)·log(1 − σ(p)) over tokens, the mean over routed blocks.

    t is 1 for tokens that the router chose, p the prediction (Raposo et al., 2024,
    arXiv:2404.02258, section 3.5); both are in a tap `[batch, tokens, 2]`, p first. Padding of
    `attention_mask` is left out.

    Raises:
        UsageError: No block is routed by a predictor, or none has that tap.
    """
    taps = outcome.raw_taps or outcome.taps
    names = options.taps or tuple(name for name in taps if name.startswith(_PREFIX))
    missing = [name for name in names if name not in taps]
    if missing or not names:
        raise UsageError(
            f"the loss routing reads a tap {missing[0]} that is not there"
            if missing
            else "the loss routing has no predictor to train",
            reason=f"there are {', '.join(taps)}" if taps else "",
            hint="put `use: depth.mixture_of_depths` with `inference: predictor` before it",
        )
    mask = attention_mask(outcome.batch)
    totals: list[Total] = []
    for name in names:
        likely, chosen = taps[name].float().unbind(-1)
        each = F.binary_cross_entropy_with_logits(likely, chosen.detach(), reduction="none")
        if mask is not None and mask.shape == each.shape:
            counts = mask != 0
            totals.append((torch.where(counts, each, 0.0).sum(), counts.sum()))
        else:
            totals.append((each.sum(), each.numel()))
    return mean_over_taps(totals)
