"""Losses between the distributions of model and teacher, softened by a temperature T.

All are scaled by T², which keeps the gradient's size: for large T it tends to (z − v) / C for each
row, z and v being the centred logits of model and teacher over C classes (Hinton et al., 2015,
arXiv:1503.02531, section 2.1). Rows are samples or tokens; those that do not count are left out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress.train import loss_config as config
from fxcompress.train.loss_config import Until, WholeSchedule, value_at
from fxcompress.train.losses._outcome import Outcome, Total
from fxcompress.train.losses._rows import check_whole, compared, wide

__all__ = [
    "CurriculumTemperature",
    "jensen_shannon",
    "reverse_kl",
    "soft_label_loss",
    "soft_labels",
]


def soft_label_loss(options: config.SoftLabels, outcome: Outcome, progress: float) -> Total:
    """Return T² · KL(p ‖ q), p = softmax(v / T) and q = softmax(z / T), summed over rows.

    Hinton et al., 2015, arXiv:1503.02531, equation 4. With `top_k`, p is the teacher's
    distribution over its k likeliest classes, made to sum to 1, and q the model's over all: what
    the model gives to other classes is then lost to it, and loss(z, z) is −T² log Σ_top q.
    """
    ours, theirs = compared(options, outcome)
    temperature = value_at(options.temperature, progress)
    rows = _soft_rows(ours, theirs, temperature, top_k_at(options.top_k, progress))
    return rows.sum(), len(rows)


def soft_labels(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T² · KL(softmax(v / T) ‖ softmax(z / T)), mean over rows.

    Args:
        logits: z `[rows, classes]`.
        teacher: v, the same shape.
        temperature: T, above 0.
    """
    rows = _soft_rows(wide(logits), wide(teacher), temperature)
    return rows.sum() / max(len(rows), 1)


def reverse_kl(options: config.ReverseKl, outcome: Outcome, progress: float) -> Total:
    """Return T² · KL(q ‖ p), the model's distribution first, summed over rows.

    Gu et al., 2024 (MiniLLM), arXiv:2306.08543, section 2, here on given tokens: the model need
    not cover what the teacher finds possible, only stay where the teacher is.

    Raises:
        DataError: The teacher gives a class no probability at all, as stored top-k logits do.
    """
    ours, theirs = compared(options, outcome)
    check_whole("reverse_kl", theirs)
    temperature = value_at(options.temperature, progress)
    p, q = _log_softmax(theirs, temperature), _log_softmax(ours, temperature)
    rows = temperature**2 * _divergence(q, p)
    return rows.sum(), len(rows)


def jensen_shannon(options: config.JensenShannon, outcome: Outcome, progress: float) -> Total:
    """Return T² · (β KL(p ‖ m) + (1 − β) KL(q ‖ m)) with m = β p + (1 − β) q, summed over rows.

    Agarwal et al., 2024 (GKD), arXiv:2306.13649, section 2; β = ½ is Lin's divergence (1991). For
    large T its gradient tends to β (1 − β) times that of `soft_labels`.
    """
    ours, theirs = compared(options, outcome)
    temperature, beta = value_at(options.temperature, progress), options.beta
    p, q = _log_softmax(theirs, temperature), _log_softmax(ours, temperature)
    mixed = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    rows = beta * _divergence(p, mixed) + (1 - beta) * _divergence(q, mixed)
    return temperature**2 * rows.sum(), len(rows)


class CurriculumTemperature(nn.Module):
    """T² · KL(p ‖ q) at a temperature that is learned against the model (CTKD).

    T = low + (high − low) · σ(θ). The gradient that reaches θ is multiplied by −λ: while the model
    lowers the loss, θ raises it, the more the larger λ, from easy to hard. λ follows the schedule
    `reversal`. Li et al., 2023, arXiv:2211.16231, section 3 (global temperature); in the
    published code low is 1, high 21 and θ first 1, and λ rises over the first ten epochs.
    """

    def __init__(self, options: config.Ctkd) -> None:
        super().__init__()
        share = (options.start - options.low) / (options.high - options.low)
        self.theta = nn.Parameter(torch.tensor(math.log(share / (1 - share))))

    def temperature(self, options: config.Ctkd, progress: float = 0.0) -> Tensor:
        """Return T, which passes on −λ of its gradient."""
        strength = value_at(options.reversal, progress)
        # The value is θ, the gradient −λ.
        theta = self.theta.detach() * (1 + strength) - self.theta * strength
        return options.low + (options.high - options.low) * theta.sigmoid()

    def forward(self, options: config.Ctkd, outcome: Outcome, progress: float) -> Total:
        """Return the sum over rows, and their number.

        Raises:
            DataError: The teacher gives a class no probability at all.
        """
        ours, theirs = compared(options, outcome)
        # With -inf, the gradient of the temperature would be NaN.
        check_whole("ctkd", theirs)
        rows = _soft_rows(ours, theirs, self.temperature(options, progress))
        return rows.sum(), len(rows)


def top_k_at(top_k: WholeSchedule | None, progress: float) -> int | None:
    """Return how many classes count at this point of the training; None for all."""
    if isinstance(top_k, Until):
        return top_k.start if progress < top_k.until else None
    return None if top_k is None else round(value_at(top_k, progress))


def _soft_rows(
    logits: Tensor, teacher: Tensor, temperature: float | Tensor, top_k: int | None = None
) -> Tensor:
    """Return T² · KL(p ‖ q) of each row."""
    q = _log_softmax(logits, temperature)
    if top_k is not None and top_k < teacher.shape[-1]:
        teacher, places = teacher.topk(top_k, dim=-1)
        q = q.gather(-1, places)
    return temperature**2 * _divergence(_log_softmax(teacher, temperature), q)


def _log_softmax(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Return log softmax(z / T); where z is -inf, a number so low that its exponential is 0."""
    found = F.log_softmax(logits / temperature, dim=-1)
    if not logits.numel() or not bool(logits.detach().amin().isneginf()):
        return found
    # 0 · -inf would be NaN in p · log p.
    return found.clamp(min=torch.finfo(found.dtype).min / 4)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p ‖ q) of each row of log probabilities."""
    return (p.exp() * (p - q)).sum(-1)
