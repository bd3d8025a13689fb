"""Losses on where a model looks: maps of activation, attention probabilities, relations of tokens.

They read taps as they are, whatever the number of channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fxcompress.errors import DataError
from fxcompress.train import loss_config as config
from fxcompress.train.losses._outcome import Outcome, Total
from fxcompress.train.losses._rows import attention_mask, labels_or_none, unit, wide
from fxcompress.train.losses._taps import mean_over_taps, places, tapped
from fxcompress.train.metrics import IGNORED

__all__ = ["attention_kl", "attention_transfer", "minilm"]


def attention_transfer(
    options: config.AttentionTransfer, outcome: Outcome, progress: float
) -> Total:
    """Return how far the maps Q of model and teacher are apart, summed over samples.

    Q = vec(Σ_c |A_c|^p), scaled to length 1. `paper`: ‖Q_S − Q_T‖₂ (Zagoruyko and Komodakis, 2017,
    arXiv:1612.03928, equation 2; the mean over layers here, the sum there, without β/2).
    `code`: the mean of (Q_S − Q_T)² over places, as their published code has it. Maps of different
    sizes are reduced to the smaller by average pooling. Tokens `[batch, seq, hidden]` have one
    place each; those that do not count are left out.

    Raises:
        DataError: A tap has no places, or they differ in number and cannot be pooled.
    """
    totals: list[Total] = []
    for name, (ours, theirs) in tapped(options, outcome).items():
        kept = places(outcome, ours.shape)
        s, t = (_energy(name, each, options.power) for each in (ours, theirs))
        if s.dim() == 3 and t.dim() == 3 and s.shape != t.shape:
            size = min(s.shape[1], t.shape[1]), min(s.shape[2], t.shape[2])
            s, t = (F.adaptive_avg_pool2d(each, size) for each in (s, t))
        _same_places(name, s, t)
        s, t = s.flatten(1), t.flatten(1)
        number = torch.full((len(s),), s.shape[1], device=s.device)
        if kept is not None and kept.dim() == 2:
            s, t = torch.where(kept, s, 0.0), torch.where(kept, t, 0.0)
            number = kept.sum(1).clamp(min=1)
            kept = kept.any(1)
        difference = unit(s) - unit(t)
        if options.form == "paper":
            each = torch.linalg.vector_norm(difference, dim=1)
        else:
            each = difference.square().sum(1) / number
        each = each if kept is None else each[kept]
        totals.append((each.sum(), len(each)))
    return mean_over_taps(totals)


def _energy(name: str, tap: Tensor, power: float) -> Tensor:
    """Return Σ_c |A_c|^p: `[batch, seq]` of tokens, `[batch, height, width]` of maps."""
    if tap.dim() < 3:
        raise DataError(
            f"the tap {name} {tuple(tap.shape)} has no places",
            reason="attention is spread over a map or over tokens",
            hint="tap a layer before the pooling, or compare `features`",
            where=name,
        )
    tap = wide(tap)
    channels = 1 if tap.dim() > 3 else -1
    # Scale changes nothing, and keeps large activations from overflowing.
    largest = tap.detach().abs().amax(tuple(range(1, tap.dim())), keepdim=True)
    scaled = tap / torch.where(largest > 0, largest, 1.0)
    return (scaled.square() if power == 2 else scaled.abs().pow(power)).sum(channels)


def attention_kl(options: config.AttentionKl, outcome: Outcome, progress: float) -> Total:
    """Return KL(A_T ‖ A_S), mean over heads, summed over queries that count.

    A `[batch, heads, queries, keys]` are attention probabilities (Wang et al., 2020, MiniLM,
    arXiv:2002.10957, section 3.1). Padded queries and keys are left out. With `heads: mean`, A is
    the mean over the heads of each side.

    Raises:
        DataError: The taps are no attention probabilities, or differ in heads or tokens.
    """
    totals: list[Total] = []
    for name, (ours, theirs) in tapped(options, outcome).items():
        _is_four(name, ours, theirs, "attention probabilities [batch, heads, queries, keys]")
        s, t = wide(ours), wide(theirs)
        if options.heads == "mean":
            s, t = s.mean(1, keepdim=True), t.mean(1, keepdim=True)
        _same_heads(name, s, t, "compare their mean: `heads: mean`")
        _same_places(name, s, t)
        seen = _tokens(outcome, s.shape[0], s.shape[3], labels=False)
        if seen is not None:
            t = t * seen[:, None, None, :]
        tiny = torch.finfo(s.dtype).tiny
        rows = (t * (t.clamp(min=tiny).log() - s.clamp(min=tiny).log())).sum(-1).mean(1)
        totals.append(_over_queries(rows, _tokens(outcome, s.shape[0], s.shape[2])))
    return mean_over_taps(totals)


def minilm(options: config.MiniLm, outcome: Outcome, progress: float) -> Total:
    """Return KL(R_T ‖ R_S), mean over relation heads, summed over tokens that count.

    R = softmax(V Vᵀ / √d) over the tokens of `attention_mask`, V the values of a head of width d:
    the value relation of Wang et al., 2020, MiniLM, arXiv:2002.10957, section 3.2; of queries
    or keys instead: MiniLMv2, arXiv:2012.15828, section 3. A tap is `[batch, heads, seq, d]` or
    `[batch, seq, hidden]`; `heads` splits all its channels anew, so that both sides have as many.

    Raises:
        DataError: Heads or tokens differ in number, or channels do not split into heads.
    """
    totals: list[Total] = []
    for name, (ours, theirs) in tapped(options, outcome).items():
        s, t = (_in_heads(name, wide(each), options.heads) for each in (ours, theirs))
        _same_heads(name, s, t, "split both into as many: `heads: 12`")
        _same_places(name, s[..., 0], t[..., 0])
        kept = _tokens(outcome, s.shape[0], s.shape[2], labels=False)
        p, q = _relation(t, kept), _relation(s, kept)
        rows = (p.exp() * (p - q)).sum(-1).mean(1)
        totals.append(_over_queries(rows, _tokens(outcome, s.shape[0], s.shape[2])))
    return mean_over_taps(totals)


def _relation(heads: Tensor, kept: Tensor | None) -> Tensor:
    """Return log softmax(X Xᵀ / √d) `[batch, heads, seq, seq]`."""
    scores = heads @ heads.transpose(2, 3) / heads.shape[3] ** 0.5
    if kept is not None:
        # Not -inf: a sample of which nothing counts would be NaN.
        scores = scores.masked_fill(~kept[:, None, None, :], torch.finfo(scores.dtype).min / 4)
    return F.log_softmax(scores, dim=-1)


def _in_heads(name: str, tap: Tensor, heads: int | None) -> Tensor:
    """Return `[batch, heads, seq, d]`."""
    if tap.dim() not in (3, 4):
        raise DataError(
            f"the tap {name} {tuple(tap.shape)} holds no tokens",
            reason="a relation is of [batch, seq, hidden] or [batch, heads, seq, d]",
            where=name,
        )
    if tap.dim() == 4:
        if heads is None or heads == tap.shape[1]:
            return tap
        tap = tap.transpose(1, 2).flatten(2)
    heads = heads or 1
    if tap.shape[2] % heads:
        raise DataError(
            f"the {tap.shape[2]} channels of the tap {name} do not split into {heads} heads",
            hint="choose a number of heads that divides the widths of model and teacher",
            where=name,
        )
    return tap.reshape(*tap.shape[:2], heads, -1).transpose(1, 2)


def _tokens(outcome: Outcome, batch: int, seq: int, *, labels: bool = True) -> Tensor | None:
    """Return which tokens count, `[batch, seq]`; as keys, by `attention_mask` alone."""
    mask, target = attention_mask(outcome.batch), labels_or_none(outcome.target)
    found = None if mask is None or tuple(mask.shape) != (batch, seq) else mask != 0
    if labels and target is not None and not target.is_floating_point():
        own = target[:, None].expand(-1, seq) if target.dim() == 1 else target
        if tuple(own.shape) == (batch, seq):
            found = own != IGNORED if found is None else found & (own != IGNORED)
    return found


def _over_queries(rows: Tensor, kept: Tensor | None) -> Total:
    """Return the sum of `[batch, queries]` over those that count, and their number."""
    rows = rows.flatten() if kept is None else rows[kept]
    return rows.sum(), len(rows)


def _is_four(name: str, ours: Tensor, theirs: Tensor, what: str) -> None:
    for tap in (ours, theirs):
        if tap.dim() != 4:
            raise DataError(
                f"the tap {name} {tuple(tap.shape)} is none of {what}",
                hint="tap the attention: `what: attention`",
                where=name,
            )


def _same_heads(name: str, ours: Tensor, theirs: Tensor, hint: str) -> None:
    if ours.shape[1] != theirs.shape[1]:
        raise DataError(
            f"the tap {name} has {ours.shape[1]} heads in the model, {theirs.shape[1]} in the "
            "teacher",
            hint=hint,
            where=name,
        )


def _same_places(name: str, ours: Tensor, theirs: Tensor) -> None:
    if ours.shape != theirs.shape:
        raise DataError(
            f"the tap {name} has other places in the model than in the teacher",
            reason=f"{tuple(ours.shape)} and {tuple(theirs.shape)}",
            hint="tap layers that see as many tokens or places",
            where=name,
        )
