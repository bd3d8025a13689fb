"""Losses against labels and tokens."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from fxcompress.errors import DataError
from fxcompress.train import loss_config as config
from fxcompress.train.loss_config import value_at
from fxcompress.train.losses._outcome import Outcome, Total
from fxcompress.train.losses._rows import (
    classes_first,
    labels_of,
    labels_or_none,
    rows_of,
    same_shape,
    wide,
)
from fxcompress.train.metrics import IGNORED, main_output, next_tokens

__all__ = ["hard_labels", "next_token", "sequence_level", "step_by_step"]

RATIONALE, LABEL = 1, 2
"""What `segments` says of a token; any other number leaves it out."""


def hard_labels(options: config.HardLabels, outcome: Outcome, progress: float) -> Total:
    """Return −Σ_c t_c · log softmax(z)_c, summed over the targets that are not -100.

    Targets are classes `[batch, ...]`, or probabilities of the shape of the logits; the t of a
    class is 1 − s + s/C with smoothing s, of the others s/C (Szegedy et al., 2016,
    arXiv:1512.00567, section 7). A batch without a target that counts has loss 0.
    """
    logits, target = main_output(outcome.output), labels_of(outcome.target)
    if target.is_floating_point():
        same_shape(logits, target, "logits and target probabilities")
        first = options.classes == "first" or (options.classes is None and logits.dim() > 3)
        rows, shares = rows_of(logits, first), rows_of(target, first)
        total = F.cross_entropy(rows, shares, label_smoothing=options.smoothing, reduction="sum")
        return total, len(rows)
    rows = rows_of(logits, classes_first(logits, target, options.classes))
    return _cross_entropy(rows, target.flatten(), options.smoothing)


def next_token(options: config.NextToken, outcome: Outcome, progress: float) -> Total:
    """Return the negative log likelihood of each next token, as `perplexity` counts it.

    Logits are `[batch, seq, vocabulary]`; tokens are the targets `[batch, seq]`, or `input_ids` of
    a split without labels. Targets of -100 and padding of `attention_mask` are left out.
    """
    tokens = labels_or_none(outcome.target)
    scores, following = next_tokens(outcome.batch, tokens, main_output(outcome.output))
    return _cross_entropy(wide(scores), following, options.smoothing)


def sequence_level(options: config.SequenceLevel, outcome: Outcome, progress: float) -> Total:
    """Return −Σ_i log q(ŷ_i | ŷ_<i, x) of the sequences ŷ that the teacher wrote.

    Kim and Rush, 2016, arXiv:1606.07947, section 3.2: the teacher's mode, found by beam search or
    by sampling, stands for its distribution over sequences. The model is fed x and ŷ; the target
    holds ŷ where it is to be learnt, -100 elsewhere.

    Raises:
        DataError: The target is a mapping without `key`, or there is none.
    """
    target = outcome.target
    if isinstance(target, Mapping) and options.key not in target:
        raise DataError(
            f"the targets hold no {options.key}",
            reason=f"they hold {', '.join(target) or 'nothing'}",
            hint="let a data step write what the teacher answers, or name it with `key`",
        )
    tokens = labels_of(target[options.key] if isinstance(target, Mapping) else target)
    scores, following = next_tokens(outcome.batch, tokens, main_output(outcome.output))
    if options.mean == "tokens":
        return _cross_entropy(wide(scores), following, 0.0)
    each = _each(wide(scores), following, 0.0)
    counted = (following.reshape(len(tokens), -1) != IGNORED).any(1)
    return each.sum(), counted.sum()


def step_by_step(options: config.StepByStep, outcome: Outcome, progress: float) -> Total:
    """Return α · L_label + (1 − α) · L_rationale, summed over sequences.

    Each L is the mean cross entropy of a sequence's next tokens of that kind, 0 where it has none
    (Hsieh et al., 2023, arXiv:2305.02301, section 3.2, with both weights summing to 1). The target
    is a mapping of `labels` `[batch, seq]` and `segments`, the same shape: 1 marks tokens of the
    rationale, 2 of the label, anything else is left out. `segments` may stand in the batch.

    Raises:
        DataError: There are no segments, or their shape is another.
    """
    tokens = labels_of(outcome.target)
    segments = _segments(outcome)
    same_shape(tokens, segments, "labels and segments")
    scores, following = next_tokens(outcome.batch, tokens, main_output(outcome.output))
    each = _each(wide(scores), following, 0.0)
    each, following = each.reshape(len(tokens), -1), following.reshape(len(tokens), -1)
    kind = segments[:, 1:].masked_fill(following == IGNORED, 0)

    def mean_over(place: Tensor) -> Tensor:
        return (each * place).sum(1) / place.sum(1).clamp(min=1)

    alpha = value_at(options.alpha, progress)
    label, rationale = mean_over(kind == LABEL), mean_over(kind == RATIONALE)
    counted = ((kind == LABEL) | (kind == RATIONALE)).any(1)
    return (alpha * label + (1 - alpha) * rationale).sum(), counted.sum()


def _segments(outcome: Outcome) -> Tensor:
    for place in (outcome.target, outcome.batch):
        found = place.get("segments") if isinstance(place, Mapping) else None
        if isinstance(found, Tensor):
            return found
    raise DataError(
        "the targets do not say which tokens are rationale and which are label",
        hint="let the split yield targets {labels, segments}: 1 for rationale, 2 for label",
    )


def _cross_entropy(rows: Tensor, labels: Tensor, smoothing: float) -> Total:
    """Return the cross entropy of `[rows, classes]` over the labels that are not -100."""
    return _each(rows, labels, smoothing).sum(), (labels != IGNORED).sum()


def _each(rows: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Return the cross entropy of each of `[rows, classes]`; 0 where the label is -100."""
    try:
        return F.cross_entropy(
            rows, labels.long(), ignore_index=IGNORED, label_smoothing=smoothing, reduction="none"
        )
    except IndexError as error:
        raise DataError(
            f"a target is none of the {rows.shape[-1]} classes",
            reason=f"targets go from {int(labels.min())} to {int(labels.max())}",
            hint="classes count from 0; -100 leaves a place out",
        ) from error
