"""Outputs and targets as rows: `[rows, classes]`, and which rows count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxcompress.errors import DataError, UsageError
from fxcompress.train.loss_config import Logits
from fxcompress.train.losses._outcome import Outcome
from fxcompress.train.metrics import IGNORED, main_output

__all__ = [
    "attention_mask",
    "check_whole",
    "classes_first",
    "compared",
    "labels_of",
    "labels_or_none",
    "rows_of",
    "same_shape",
    "teacher_output",
    "unit",
    "wide",
]


def compared(options: Logits, outcome: Outcome) -> tuple[Tensor, Tensor]:
    """Return the logits of model and teacher that count, both `[rows, classes]`.

    Left out are places with a target of -100 and padding of `attention_mask`. The teacher's carry
    no gradient.

    Raises:
        DataError: The shapes differ, or do not fit the targets.
        UsageError: There is no teacher.
    """
    logits, teacher = main_output(outcome.output), teacher_output(outcome)
    target, mask = labels_or_none(outcome.target), attention_mask(outcome.batch)
    if options.shift:
        if logits.dim() != 3:
            raise DataError(
                f"logits {tuple(logits.shape)} cannot be shifted",
                reason="`shift` reads logits as [batch, seq, vocabulary]",
                hint="leave `shift` out",
            )
        logits, teacher = logits[:, :-1], teacher[:, :-1]
        target = target[:, 1:] if target is not None and target.dim() == 2 else target
        mask = mask[:, 1:] if mask is not None and mask.dim() == 2 else mask
    first = classes_first(logits, target, options.classes)
    _same_classes(logits, teacher, 1 if first else -1)
    ours, theirs = rows_of(logits, first), rows_of(teacher, first)
    kept = _counted(target, mask, ours.shape[0])
    # Where all count, a copy of the rows is spared.
    return (ours, theirs) if kept is None or bool(kept.all()) else (ours[kept], theirs[kept])


def check_whole(use: str, theirs: Tensor) -> None:
    """Check that the teacher gives every class a logit.

    Raises:
        DataError: A logit is -inf, as where only the teacher's top k are stored.
    """
    if theirs.numel() and bool(theirs.amin().isneginf()):
        raise DataError(
            f"{use} needs the teacher's whole distribution",
            reason="a logit of the teacher is -inf, as where only its top k are stored",
            hint="compare with soft_labels, or store whole logits",
        )


def teacher_output(outcome: Outcome) -> Tensor:
    """Return the teacher's main output, where the model's is, without gradient.

    Raises:
        UsageError: There is no teacher.
    """
    if outcome.teacher is None:
        raise UsageError(
            "a loss compares with a teacher, and there is none",
            hint="say which: `teacher: original`",
        )
    return main_output(outcome.teacher).detach().to(main_output(outcome.output).device)


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
    """Return a tensor in float32 or wider."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def unit(rows: Tensor) -> Tensor:
    """Return the rows of the last dim scaled to length 1; rows of zeros stay zeros.

    Unlike a length that is kept above some epsilon, this gives rows of zeros no huge gradient.
    """
    lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / torch.where(lengths > 0, lengths, 1.0)


def labels_or_none(target: Any) -> Tensor | None:
    """Return the labels: a target that is a tensor, or `labels` of one that is a mapping."""
    found = target.get("labels") if isinstance(target, Mapping) else target
    return found if isinstance(found, Tensor) else None


def labels_of(target: Any) -> Tensor:
    """Return the labels.

    Raises:
        DataError: There are none.
    """
    found = labels_or_none(target)
    if found is None:
        raise DataError(
            "the split has no labels, and a loss needs them",
            hint="let the data factory yield (batch, target), or train on losses that compare with "
            "a teacher alone, such as soft_labels",
        )
    return found


def attention_mask(batch: Any) -> Tensor | None:
    """Return the batch's `attention_mask`, None without one."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) else None


def same_shape(a: Tensor, b: Tensor, what: str) -> None:
    """Check that two tensors have one shape.

    Raises:
        DataError: They have not.
    """
    if a.shape != b.shape:
        raise DataError(f"{what} differ in shape", reason=f"{tuple(a.shape)} and {tuple(b.shape)}")


def _same_classes(logits: Tensor, teacher: Tensor, dim: int) -> None:
    if logits.dim() == teacher.dim() and logits.shape[dim] != teacher.shape[dim]:
        raise DataError(
            f"the model's logits have {logits.shape[dim]} classes, the teacher's "
            f"{teacher.shape[dim]}",
            reason="their classes, or the vocabularies of their tokenizers, are not the same",
            hint="choose a teacher with the same classes or tokenizer, or compare taps, which "
            "know no classes: `features`, `rkd`, `similarity_preserving`",
        )
    same_shape(logits, teacher, "logits of the model and of the teacher")


def _counted(target: Tensor | None, mask: Tensor | None, rows: int) -> Tensor | None:
    """Return which rows count, `[rows]`; None where all do."""
    kept: Tensor | None = None
    if target is not None and not target.is_floating_point() and target.numel() == rows:
        kept = (target != IGNORED).flatten()
    if mask is not None and mask.numel() == rows:
        seen = (mask != 0).flatten()
        kept = seen if kept is None else kept & seen
    return kept
