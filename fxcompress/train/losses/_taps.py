"""Tapped tensors: which a loss reads, which of their places count, and means over taps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fxcompress.errors import DataError, UsageError
from fxcompress.train.loss_config import Taps
from fxcompress.train.losses._outcome import Outcome, Total
from fxcompress.train.losses._rows import attention_mask, labels_or_none, unit, wide
from fxcompress.train.metrics import IGNORED

__all__ = [
    "Shapes",
    "as_maps",
    "channels",
    "embedded",
    "embeddings",
    "mean_over_taps",
    "places",
    "rows_counted",
    "tap_names",
    "tapped",
]

Shapes: TypeAlias = Mapping[str, tuple[Sequence[int], Sequence[int]]]
"""Of each tap by name, the shapes of the model's tensor and of the teacher's."""


def tapped(options: Taps, outcome: Outcome) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each tap that a loss reads: the model's tensor and the teacher's, without gradient.

    The model's are those after projectors where the loss compares equal shapes, else as they are.

    Raises:
        UsageError: There are no taps, or none of a name.
        DataError: The shapes differ although the loss compares equal shapes.
    """
    theirs = outcome.teacher_taps
    ours = outcome.taps if options.projects else (outcome.raw_taps or outcome.taps)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name in tap_names(options, [name for name in ours if name in theirs]):
        found[name] = pair = ours[name], theirs[name].detach().to(ours[name].device)
        if options.projects and pair[0].shape != pair[1].shape:
            raise DataError(
                f"the tap {name} has another shape in the model than in the teacher",
                reason=f"{tuple(pair[0].shape)} and {tuple(pair[1].shape)}",
                hint="let the tap have a projector, or compare relations (`rkd`, "
                "`similarity_preserving`), which need no equal widths",
                where=name,
            )
    return found


def tap_names(options: Taps, known: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the taps that a loss reads, out of those that there are.

    Raises:
        UsageError: There are no taps, or none of a name.
    """
    use = getattr(options, "use", "features")
    if not known:
        raise UsageError(
            f"the loss {use} reads taps, and there are none",
            hint="put a pass `distill.tap` before the training: it names places in model and "
            "teacher",
        )
    for name in options.taps:
        if name not in known:
            raise UsageError(
                f"the loss {use} reads a tap {name} that is not there",
                reason=f"there are {', '.join(known)}",
                where=name,
            )
    return options.taps or tuple(known)


def mean_over_taps(totals: Sequence[Total]) -> Total:
    """Return the mean of the taps' means, as one sum by the count of the first tap."""
    total, count = totals[0]
    one = _at_least_one(count)
    for each, own in totals[1:]:
        total = total + (each if own is count else each * (one / _at_least_one(own)))
    return total / len(totals), count


def _at_least_one(count: Tensor | float) -> Tensor | float:
    """Return a count to divide by: 1 where it is 0."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def places(outcome: Outcome, shape: Sequence[int]) -> Tensor | None:
    """Return which places of a tap count, `[batch]` or `[batch, seq]`; None where all do.

    Tokens `[batch, seq, hidden]` follow `attention_mask` and the targets of that shape; of any
    other tap, samples whose only target is -100 are left out.
    """
    target, mask = labels_or_none(outcome.target), attention_mask(outcome.batch)
    known = [] if mask is None else [mask != 0]
    if target is not None and not target.is_floating_point():
        known.append(target != IGNORED)
    tokens = [each for each in known if len(shape) == 3 and tuple(each.shape) == tuple(shape[:2])]
    samples = [each for each in known if each.dim() == 1 and len(each) == shape[0]]
    found: Tensor | None = None
    for each in (*tokens, *(s[:, None].expand_as(tokens[0]) if tokens else s for s in samples)):
        found = each if found is None else found & each
    return found


def rows_counted(outcome: Outcome, shape: Sequence[int]) -> Tensor | None:
    """Return `places`, and of `[batch, heads, seq, d]` which of `[batch, heads, seq]` count.

    Four dims are heads of tokens where there is an `attention_mask`, or targets, of `[batch, seq]`.
    """
    if len(shape) == 4:
        tokens = places(outcome, (shape[0], shape[2], shape[3]))
        if tokens is not None and tokens.dim() == 2:
            return tokens[:, None].expand(-1, shape[1], -1)
    return places(outcome, shape)


def as_maps(tap: Tensor) -> Tensor:
    """Return `[batch, channels, places]`: tokens have their channels last, feature maps first."""
    tap = wide(tap)
    if tap.dim() == 2:
        return tap[..., None]
    return tap.transpose(1, 2) if tap.dim() == 3 else tap.flatten(2)


def embeddings(outcome: Outcome, ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Return `[samples, features]` of both sides: flat, tokens that do not count set to 0.

    Samples of which nothing counts are left out. Zeros change neither distances nor products.
    """
    found: list[Tensor] = []
    for tap in (wide(ours), wide(theirs)):
        kept = rows_counted(outcome, tap.shape)
        if kept is not None:
            whole = kept.reshape(kept.shape + (1,) * (tap.dim() - kept.dim()))
            tap = torch.where(whole, tap, 0.0)
        found.append(tap.flatten(1))
    samples = samples_counted(outcome, ours, theirs)
    return (found[0], found[1]) if samples is None else (found[0][samples], found[1][samples])


def samples_counted(outcome: Outcome, *taps: Tensor) -> Tensor | None:
    """Return the samples of which something counts in each tap, `[batch]`; None where all do."""
    found: Tensor | None = None
    for tap in taps:
        kept = places(outcome, tap.shape)
        if kept is not None:
            own = kept.any(1) if kept.dim() > 1 else kept
            found = own if found is None else found & own
    return found


def pooled(outcome: Outcome, tap: Tensor) -> Tensor:
    """Return `[batch, channels]`: the mean over the places that count."""
    maps, kept = as_maps(tap), places(outcome, tap.shape)
    if kept is None or kept.dim() == 1:
        return maps.mean(2)
    counted = kept.sum(1, keepdim=True).clamp(min=1)
    return torch.where(kept[:, None], maps, 0.0).sum(2) / counted


def embedded(
    outcome: Outcome, taps: tuple[Tensor, Tensor], heads: tuple[nn.Module, nn.Module]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return both sides averaged over places, through their heads, of length 1, and who counts.

    Returns:
        Two of `[samples, dim]`, of the samples of which something counts, and which of the batch
        these are, `[batch]`; None where all are.
    """
    kept = samples_counted(outcome, *taps)
    rows = (pooled(outcome, tap) for tap in taps)
    ours, theirs = (
        unit(head(each if kept is None else each[kept]))
        for head, each in zip(heads, rows, strict=True)
    )
    return ours, theirs, kept


def channels(shape: Sequence[int]) -> int:
    """Return the size of a tap's channels: the second of maps, the last of tokens and rows."""
    return shape[1] if len(shape) > 3 else shape[-1]
