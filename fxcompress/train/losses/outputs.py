"""Losses on outputs: against labels, and against the teacher's outputs."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fxcompress.errors import DataError
from fxcompress.train import loss_config as config
from fxcompress.train.loss_config import value_at
from fxcompress.train.losses._outcome import Outcome, Total
from fxcompress.train.losses._rows import (
    classes_first,
    counted,
    labels_of,
    rows_of,
    same_shape,
    wide,
)
from fxcompress.train.metrics import IGNORED, main_output, next_tokens

__all__ = ["hard_labels", "mse", "next_token", "soft_label_loss", "soft_labels"]


def hard_labels(options: config.HardLabels, outcome: Outcome, progress: float) -> Total:
    """Return −Σ_c t_c · log softmax(z)_c, mean over the targets that are not -100.

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
    """Return the mean negative log likelihood of each next token, as `perplexity` counts it.

    Logits are `[batch, seq, vocabulary]`; tokens are the targets `[batch, seq]`, or `input_ids` of
    a split without labels. Targets of -100 and padding of `attention_mask` are left out.
    """
    scores, following = next_tokens(outcome.batch, outcome.target, main_output(outcome.output))
    return _cross_entropy(wide(scores), following, options.smoothing)


def soft_label_loss(options: config.SoftLabels, outcome: Outcome, progress: float) -> Total:
    """Return `soft_labels` over all places that count.

    Left out are places with a target of -100 and padding of `attention_mask`.
    """
    logits = main_output(outcome.output)
    teacher = main_output(outcome.teacher).to(logits.device)
    same_shape(logits, teacher, "logits of the model and of the teacher")
    target = outcome.target if isinstance(outcome.target, Tensor) else None
    first = classes_first(logits, target, options.classes)
    ours, theirs = rows_of(logits, first), rows_of(teacher, first)
    kept = counted(outcome, ours.shape[0])
    if kept is not None:
        ours, theirs = ours[kept], theirs[kept]
    temperature = value_at(options.temperature, progress)
    return soft_labels(ours, theirs, temperature) * len(ours), len(ours)


def soft_labels(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T² · KL(softmax(v / T) ‖ softmax(z / T)), mean over rows.

    T² keeps the gradient's size: for large T it tends to (z − v) / C, with both centred
    (Hinton et al., 2015, arXiv:1503.02531, equation 4).

    Args:
        logits: z `[rows, classes]`.
        teacher: v, the same shape.
        temperature: T, above 0.
    """
    student = F.log_softmax(wide(logits) / temperature, dim=-1)
    target = F.log_softmax(wide(teacher) / temperature, dim=-1)
    total = F.kl_div(student, target, log_target=True, reduction="sum")
    return total * temperature**2 / max(len(logits), 1)


def mse(options: config.Mse, outcome: Outcome, progress: float) -> Total:
    """Return the mean of (y − t)² over all elements, t being the targets or the teacher's output.

    Raises:
        DataError: The shapes differ; nothing is broadcast.
    """
    output = main_output(outcome.output)
    if options.against == "teacher":
        other = main_output(outcome.teacher).to(output.device)
    else:
        other = labels_of(outcome.target)
    same_shape(output, other, f"the output and the {options.against.rstrip('s')}")
    return F.mse_loss(wide(output), wide(other), reduction="sum"), output.numel()


def _cross_entropy(rows: Tensor, labels: Tensor, smoothing: float) -> Total:
    """Return the cross entropy of `[rows, classes]` over the labels that are not -100."""
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
    return total, (labels != IGNORED).sum()
