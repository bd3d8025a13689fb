"""Losses by name: each a mean over samples (or tokens), so that a batch's size changes no scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from fxcompress.errors import DataError, UsageError
from fxcompress.train import config
from fxcompress.train.config import LossConfig, value_at
from fxcompress.train.metrics import IGNORED, main_output, next_tokens

__all__ = ["Outcome", "Term", "make_terms", "soft_labels"]


@dataclass(frozen=True)
class Outcome:
    """What the losses of one step read.

    Attributes:
        output: What the model returned: a tensor, or a tuple or mapping that holds one.
        teacher: What the teacher returned; None without one.
        batch: The inputs.
        target: The labels; None where the split has none.
    """

    output: Any
    teacher: Any
    batch: Any
    target: Any


LossFunction: TypeAlias = Callable[[Any, Outcome, float], Tensor]
"""(options, outcome, progress from 0 to 1) -> the mean over the samples that count."""


@dataclass(frozen=True)
class Term:
    """One loss of a training: its name in the history, its options and its function."""

    name: str
    options: Any
    function: LossFunction

    def loss(self, outcome: Outcome, progress: float) -> Tensor:
        """Return the loss, without its weight."""
        return self.function(self.options, outcome, progress)

    def weight(self, progress: float) -> float:
        """Return what the loss is multiplied by."""
        return value_at(self.options.weight, progress)


def make_terms(
    chosen: tuple[LossConfig, ...], functions: Mapping[str, Callable[..., Tensor]] | None = None
) -> tuple[Term, ...]:
    """Return the terms of these loss options; a second one of a kind is named `mse@2`.

    Args:
        chosen: What to add up.
        functions: The functions of `custom` losses, by what `factory` says.

    Raises:
        UsageError: A custom loss has no function.
    """
    terms: list[Term] = []
    for options in chosen:
        function, kind = LOSSES.get(options.use), str(options.use)
        if isinstance(options, config.Custom):
            function, kind = _own(options, functions or {}), options.factory.rpartition(":")[2]
        assert function is not None, "every loss but a custom one has a row in LOSSES"
        count = sum(term.name.partition("@")[0] == kind for term in terms) + 1
        terms.append(Term(kind if count == 1 else f"{kind}@{count}", options, function))
    return tuple(terms)


def _own(options: config.Custom, functions: Mapping[str, Callable[..., Tensor]]) -> LossFunction:
    if options.factory not in functions:
        raise UsageError(
            f"the loss {options.factory} has no function",
            hint="give it to fit: `functions={" + repr(options.factory) + ": fn}`",
        )
    own = functions[options.factory]

    def call(_: config.Custom, outcome: Outcome, progress: float) -> Tensor:
        value = own(outcome, **options.args)
        if not isinstance(value, Tensor) or value.numel() != 1:
            what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UsageError(
                f"the loss {options.factory} returned {what}",
                reason="a loss is a tensor of one number",
            )
        return value

    return call


def hard_labels(options: config.HardLabels, outcome: Outcome, progress: float) -> Tensor:
    """Return −Σ_c t_c · log softmax(z)_c, mean over the targets that are not -100.

    Targets are classes `[batch, ...]`, or probabilities of the shape of the logits; the t of a
    class is 1 − s + s/C with smoothing s, of the others s/C (Szegedy et al., 2016,
    arXiv:1512.00567, section 7). A batch without a target that counts has loss 0.
    """
    logits, target = main_output(outcome.output), _labels(outcome.target)
    if target.is_floating_point():
        _same_shape(logits, target, "logits and target probabilities")
        first = options.classes == "first" or (options.classes is None and logits.dim() > 3)
        rows, shares = _rows(logits, first), _rows(target, first)
        return F.cross_entropy(rows, shares, label_smoothing=options.smoothing)
    rows = _rows(logits, _classes_first(logits, target, options.classes))
    return _cross_entropy(rows, target.flatten(), options.smoothing)


def next_token(options: config.NextToken, outcome: Outcome, progress: float) -> Tensor:
    """Return the mean negative log likelihood of each next token, as `perplexity` counts it.

    Logits are `[batch, seq, vocabulary]`; tokens are the targets `[batch, seq]`, or `input_ids` of
    a split without labels. Targets of -100 and padding of `attention_mask` are left out.
    """
    scores, following = next_tokens(outcome.batch, outcome.target, main_output(outcome.output))
    return _cross_entropy(_wide(scores), following, options.smoothing)


def soft_label_loss(options: config.SoftLabels, outcome: Outcome, progress: float) -> Tensor:
    """Return `soft_labels` over all places that count.

    Left out are places with a target of -100 and padding of `attention_mask`.
    """
    logits = main_output(outcome.output)
    teacher = main_output(outcome.teacher).to(logits.device)
    _same_shape(logits, teacher, "logits of the model and of the teacher")
    target = outcome.target if isinstance(outcome.target, Tensor) else None
    first = _classes_first(logits, target, options.classes)
    ours, theirs = _rows(logits, first), _rows(teacher, first)
    kept = _counted(outcome, ours.shape[0])
    if kept is not None:
        ours, theirs = ours[kept], theirs[kept]
    return soft_labels(ours, theirs, value_at(options.temperature, progress))


def soft_labels(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T² · KL(softmax(v / T) ‖ softmax(z / T)), mean over rows.

    T² keeps the gradient's size: for large T it tends to (z − v) / C, with both centred
    (Hinton et al., 2015, arXiv:1503.02531, equation 4).

    Args:
        logits: z `[rows, classes]`.
        teacher: v, the same shape.
        temperature: T, above 0.
    """
    student = F.log_softmax(_wide(logits) / temperature, dim=-1)
    target = F.log_softmax(_wide(teacher) / temperature, dim=-1)
    total = F.kl_div(student, target, log_target=True, reduction="sum")
    return total * temperature**2 / max(len(logits), 1)


def mse(options: config.Mse, outcome: Outcome, progress: float) -> Tensor:
    """Return the mean of (y − t)² over all elements, t being the targets or the teacher's output.

    Raises:
        DataError: The shapes differ; nothing is broadcast.
    """
    output = main_output(outcome.output)
    if options.against == "teacher":
        other = main_output(outcome.teacher).to(output.device)
    else:
        other = _labels(outcome.target)
    _same_shape(output, other, f"the output and the {options.against.rstrip('s')}")
    return F.mse_loss(_wide(output), _wide(other))


LOSSES: Final[Mapping[str, LossFunction]] = {
    "hard_labels": hard_labels,
    "next_token": next_token,
    "soft_labels": soft_label_loss,
    "mse": mse,
}


def _cross_entropy(rows: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Return the mean cross entropy of `[rows, classes]`; 0 where every label is -100."""
    try:
        total = F.cross_entropy(
            rows, labels.long(), ignore_index=IGNORED, label_smoothing=smoothing, reduction="sum"
        )
    except IndexError as error:
        raise DataError(
            f"a target is none of the {rows.shape[-1]} classes",
            reason=f"targets go from {int(labels.min())} to {int(labels.max())}",
            hint="classes count from 0; -100 leaves a place out",
        ) from error
    return total / (labels != IGNORED).sum().clamp(min=1)


def _classes_first(logits: Tensor, target: Tensor | None, told: str | None) -> bool:
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


def _rows(logits: Tensor, first: bool) -> Tensor:
    """Return `[rows, classes]` in float32 or wider."""
    moved = logits.movedim(1, -1) if first else logits
    return _wide(moved.reshape(-1, moved.shape[-1]))


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _counted(outcome: Outcome, rows: int) -> Tensor | None:
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


def _labels(target: Any) -> Tensor:
    if not isinstance(target, Tensor):
        raise DataError(
            "the split has no labels, and a loss needs them",
            hint="let the data factory yield (batch, target), or train on soft_labels alone",
        )
    return target


def _same_shape(a: Tensor, b: Tensor, what: str) -> None:
    if a.shape != b.shape:
        raise DataError(f"{what} differ in shape", reason=f"{tuple(a.shape)} and {tuple(b.shape)}")
