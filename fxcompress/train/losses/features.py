"""Losses between feature maps and hidden states of equal widths."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from fxcompress.errors import DataError, UsageError
from fxcompress.train import loss_config as config
from fxcompress.train.losses._outcome import Outcome, Total
from fxcompress.train.losses._rows import unit, wide
from fxcompress.train.losses._taps import (
    as_maps,
    mean_over_taps,
    places,
    rows_counted,
    tap_names,
    tapped,
)

__all__ = ["features", "fsp"]


def features(options: config.Features, outcome: Outcome, progress: float) -> Total:
    """Return the distance of s and t `[places, channels]`, summed over places that count.

    `l2`: 1/C Σ_c (s_c − t_c)² (Romero et al., 2015, FitNets, arXiv:1412.6550, equation 3, there a
    sum and halved; Jiao et al., 2020, TinyBERT, arXiv:1909.10351, section 3);
    `cosine`: 1 − s·t / (‖s‖‖t‖) (Sanh et al., 2019, DistilBERT, arXiv:1910.01108, section 3);
    `smooth_l1`: 1/C Σ_c h(s_c − t_c), h(x) = x²/2β within ±β, |x| − β/2 beyond (Girshick, 2015,
    Fast R-CNN, arXiv:1504.08083, equation 3, there β = 1).
    With `normalize`, s and t have length 1 (Sun et al., 2019, PKD, arXiv:1908.09355, section 3).
    The mean over taps.
    """
    totals = [_distances(options, outcome, *pair) for pair in tapped(options, outcome).values()]
    return mean_over_taps(totals)


def _distances(options: config.Features, outcome: Outcome, ours: Tensor, theirs: Tensor) -> Total:
    kept = rows_counted(outcome, ours.shape)
    heads = kept is not None and kept.dim() == 3
    first = options.channels == "first" or (
        options.channels is None and ours.dim() > 3 and not heads
    )
    if kept is not None and (kept.dim() == 1 or not first):
        ours, theirs = ours[kept], theirs[kept]
    if first:
        ours, theirs = ours.movedim(1, -1), theirs.movedim(1, -1)
    s, t = (wide(each).reshape(-1, each.shape[-1]) for each in (ours, theirs))
    if options.normalize:
        s, t = unit(s), unit(t)
    if options.distance == "cosine":
        rows = 1 - (unit(s) * unit(t)).sum(-1)
    elif options.distance == "smooth_l1":
        rows = F.smooth_l1_loss(s, t, reduction="none", beta=options.beta).mean(-1)
    else:
        rows = (s - t).square().mean(-1)
    return rows.sum(), len(rows)


def fsp(options: config.Fsp, outcome: Outcome, progress: float) -> Total:
    """Return ‖G_T − G_S‖²_F for each sample, summed; the mean over pairs of layers.

    G = 1/(hw) · Σ_places F¹ F²ᵀ `[channels of F¹, channels of F²]` of the maps of two layers of one
    model. Where their sizes differ, the larger is reduced by maximum pooling (Yim et al., 2017, A
    Gift from Knowledge Distillation, equations 1 and 2, λ_i = 1).

    Raises:
        UsageError: There is one tap only.
        DataError: The tokens of two taps differ in number.
    """
    if options.pairs:
        named = tuple(dict.fromkeys(name for pair in options.pairs for name in pair))
        found = tapped(options.model_copy(update={"taps": named}), outcome)
        chosen = list(options.pairs)
    else:
        found = tapped(options, outcome)
        chosen = list(pairwise(tap_names(options, list(found))))
    if not chosen:
        raise UsageError(
            "the loss fsp compares the flow between two taps, and there is one",
            hint="tap a second layer",
        )
    totals: list[Total] = []
    for first, last in chosen:
        ours, theirs = (_flow(outcome, found[first][side], found[last][side]) for side in (0, 1))
        totals.append(((ours - theirs).square().sum(), len(ours)))
    return mean_over_taps(totals)


def _flow(outcome: Outcome, first: Tensor, last: Tensor) -> Tensor:
    """Return the Gram matrices `[samples, m, n]` of two layers of one model."""
    kept = places(outcome, first.shape)
    if first.dim() == 4 and last.dim() == 4 and first.shape[2:] != last.shape[2:]:
        size = min(first.shape[2], last.shape[2]), min(first.shape[3], last.shape[3])
        first, last = (F.adaptive_max_pool2d(wide(each), size) for each in (first, last))
    a, b = as_maps(first), as_maps(last)
    if a.shape[2] != b.shape[2]:
        raise DataError(
            f"the flow is between layers of {a.shape[2]} and {b.shape[2]} places",
            reason="only maps [batch, channels, height, width] are pooled to one size",
            hint="tap layers of one length",
        )
    if kept is None:
        return a @ b.transpose(1, 2) / a.shape[2]
    if kept.dim() == 1:
        a, b = a[kept], b[kept]
        return a @ b.transpose(1, 2) / a.shape[2]
    counted = kept.sum(1).clamp(min=1)[:, None, None]
    whole = (torch.where(kept[:, None], a, 0.0) @ b.transpose(1, 2)) / counted
    return whole[kept.any(1)]
