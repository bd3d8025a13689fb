"""Outputs and targets as rows: `[rows, classes]`, and which rows count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxcompress.errors import DataError
from fxcompress.train.losses._outcome import Outcome
from fxcompress.train.metrics import IGNORED

__all__ = ["classes_first", "counted", "labels_of", "rows_of", "same_shape", "wide"]


def classes_first(logits: Tensor, target: Tensor | None, told: str | None) -> bool:
    """Return whether the classes are dim 1, not the last.

    Told nothing, the targets' shape says; without targets, three dims are read as
    `[batch, seq, classes]` and four or more as `[batch, classes, ...]`.

    Raises:
        DataError: Logits and targets do not agree, or both readings fit.
    """
    if logits.dim() < 2:
        raise DataError(f"logits {tuple(logits.shape)} have no dim of classes")
    if logits.dim() == 2 or told is not None or target is None:
        first = told == "first" if told else logits.dim() > 3
    else:
        last = logits.shape[:-1] == target.shape
        first = logits.shape[:1] + logits.shape[2:] == target.shape
        if last and first:
            raise DataError(
                f"logits {tuple(logits.shape)} can be read in two ways",
                reason="targets fit with the classes first and with the classes last",
                hint="say which: `classes: first` or `classes: last` in the loss",
            )
    rest = logits.shape[:1] + logits.shape[2:] if first else logits.shape[:-1]
    if target is not None and not target.is_floating_point() and rest != target.shape:
        raise DataError(
            f"logits {tuple(logits.shape)} and targets {tuple(target.shape)} do not agree",
            reason="logits are [batch, classes, ...] or [batch, ..., classes], targets without "
            "the classes",
        )
    return first


def rows_of(logits: Tensor, first: bool) -> Tensor:
    """Return `[rows, classes]` in float32 or wider."""
    moved = logits.movedim(1, -1) if first else logits
    return wide(moved.reshape(-1, moved.shape[-1]))


def wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def counted(outcome: Outcome, rows: int) -> Tensor | None:
    """Return which rows count, `[rows]`; None where all do."""
    kept: Tensor | None = None
    target = outcome.target
    if isinstance(target, Tensor) and not target.is_floating_point() and target.numel() == rows:
        kept = (target != IGNORED).flatten()
    mask = outcome.batch.get("attention_mask") if isinstance(outcome.batch, Mapping) else None
    if isinstance(mask, Tensor) and mask.numel() == rows:
        seen = (mask != 0).flatten()
        kept = seen if kept is None else kept & seen
    return kept


def labels_of(target: Any) -> Tensor:
    if not isinstance(target, Tensor):
        raise DataError(
            "the split has no labels, and a loss needs them",
            hint="let the data factory yield (batch, target), or train on soft_labels alone",
        )
    return target


def same_shape(a: Tensor, b: Tensor, what: str) -> None:
    if a.shape != b.shape:
        raise DataError(f"{what} differ in shape", reason=f"{tuple(a.shape)} and {tuple(b.shape)}")
