"""Losses on outputs and logits as they are: squares, correlations and order."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fxcompress.train import loss_config as config
from fxcompress.train.loss_config import value_at
from fxcompress.train.losses._outcome import Outcome, Total
from fxcompress.train.losses._rows import (
    check_whole,
    compared,
    labels_of,
    same_shape,
    teacher_output,
    wide,
)
from fxcompress.train.metrics import main_output

__all__ = ["dist", "mse", "ranking"]


def mse(options: config.Mse, outcome: Outcome, progress: float) -> Total:
    """Return (y − t)² summed over all elements, t being the targets or the teacher's output.

    Against the teacher's logits: Ba and Caruana, 2014, arXiv:1312.6184, section 2 (there halved).

    Raises:
        DataError: The shapes differ; nothing is broadcast.
    """
    output = main_output(outcome.output)
    if options.against == "teacher":
        other = teacher_output(outcome)
    else:
        other = labels_of(outcome.target)
    same_shape(output, other, f"the output and the {options.against.rstrip('s')}")
    return F.mse_loss(wide(output), wide(other), reduction="sum"), output.numel()


def dist(options: config.Dist, outcome: Outcome, progress: float) -> Total:
    """Return T² · (β · inter + γ · intra), times the number of rows.

    With P and Q `[rows, classes]` the softened probabilities of teacher and model and ρ Pearson's
    correlation, inter = mean over rows of 1 − ρ(P_i, Q_i), intra = mean over classes of
    1 − ρ(P_·j, Q_·j) (Huang et al., 2022, arXiv:2205.10536, section 4; T² as in the published
    code). Invariant to scale and shift of the probabilities. Rows or classes that do not
    vary have no correlation and are left out.
    """
    ours, theirs = compared(options, outcome)
    temperature = value_at(options.temperature, progress)
    q, p = (ours / temperature).softmax(-1), (theirs / temperature).softmax(-1)
    value = options.inter * _uncorrelated(q, p) + options.intra * _uncorrelated(q.T, p.T)
    return temperature**2 * value * len(ours), len(ours)


def _uncorrelated(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean of 1 − ρ over the rows of `[rows, columns]` that vary in both."""
    centred = [each - each.mean(1, keepdim=True) for each in (a, b)]
    squares = [each.square().sum(1) for each in centred]
    # Rounding alone makes a constant row vary by about the last bit of its numbers.
    least = (8 * torch.finfo(a.dtype).eps) ** 2
    varies = [own > least * each.square().sum(1) for own, each in zip(squares, (a, b), strict=True)]
    kept = varies[0] & varies[1]
    # Where a row does not vary, 1 stands for its length: no division by 0, forward or backward.
    lengths = [torch.where(kept, own, 1.0).sqrt() for own in squares]
    rho = (centred[0] * centred[1]).sum(1) / (lengths[0] * lengths[1])
    return torch.where(kept, 1 - rho, 0.0).sum() / kept.sum().clamp(min=1)


def ranking(options: config.Ranking, outcome: Outcome, progress: float) -> Total:
    """Return how far the model is from the teacher's order of its `top` likeliest classes.

    With z the model's logits in the teacher's order, best first:
    `pairwise`: mean over pairs i < j that the teacher tells apart of max(0, m − (z_i − z_j)), the
    hinge of Herbrich et al., 2000 (Large margin rank boundaries);
    `listwise`: −1/k · Σ_i log(e^{z_i} / Σ_{j ≥ i} e^{z_j}), the likelihood of the order under
    Plackett and Luce (Xia et al., 2008, Listwise approach to learning to rank, ListMLE).
    Summed over rows.

    Raises:
        DataError: Of the classes to order, the teacher's logits of some are not known.
    """
    ours, theirs = compared(options, outcome)
    best, places = theirs.topk(min(options.top, theirs.shape[-1]), dim=-1)
    scores = ours.gather(-1, places)
    if options.form == "listwise":
        check_whole(f"an order of {best.shape[-1]} classes", best)
        rest = scores.flip(-1).logcumsumexp(-1).flip(-1)
        return (rest - scores).mean(-1).sum(), len(scores)
    first, second = torch.triu_indices(
        best.shape[1], best.shape[1], offset=1, device=best.device
    ).unbind()
    apart = best[:, first] > best[:, second]
    hinge = (options.margin - (scores[:, first] - scores[:, second])).relu() * apart
    return (hinge.sum(1) / apart.sum(1).clamp(min=1)).sum(), len(scores)
