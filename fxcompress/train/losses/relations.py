"""Losses between relations of the samples of a batch: they need no equal widths.

A relation is among the samples of one batch: with gradient accumulation each micro-batch is
compared in itself, and enters with the share of its samples.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fxcompress.train import loss_config as config
from fxcompress.train.losses._outcome import Outcome, Total
from fxcompress.train.losses._rows import unit
from fxcompress.train.losses._taps import embeddings, mean_over_taps, tapped

__all__ = ["cka", "rkd", "similarity_preserving"]


def rkd(options: config.Rkd, outcome: Outcome, progress: float) -> Total:
    """Return λ_D · L_D + λ_A · L_A, times the number of samples; the mean over taps.

    L_D is the mean over pairs of h(ψ_D(t_i, t_j) − ψ_D(s_i, s_j)), ψ_D the distance over the mean
    distance μ of the batch; L_A the mean over triplets of distinct samples of
    h(ψ_A(t_i, t_j, t_k) − ψ_A(s_i, s_j, s_k)), ψ_A the cosine of the angle at j; h is Huber's loss
    with δ = 1 (Park et al., 2019, arXiv:1904.05068, section 3.2). Invariant to scale, shift
    and rotation of either side. A batch of one sample has no pair and loss 0.
    """
    totals: list[Total] = []
    for ours, theirs in tapped(options, outcome).values():
        s, t = embeddings(outcome, ours, theirs)
        value = s.sum() * 0
        if options.distance and len(s) > 1:
            value = value + options.distance * _distance_loss(s, t)
        if options.angle and len(s) > 2:
            value = value + options.angle * _angle_loss(s, t)
        totals.append((value * len(s), len(s)))
    return mean_over_taps(totals)


def _distances(rows: Tensor) -> Tensor:
    # The way over products loses small distances to rounding.
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")


def _distance_loss(s: Tensor, t: Tensor) -> Tensor:
    pairs = len(s) * (len(s) - 1)
    tiny = torch.finfo(s.dtype).tiny
    psi = [each / (each.sum() / pairs).clamp(min=tiny) for each in (_distances(s), _distances(t))]
    return F.smooth_l1_loss(psi[0], psi[1], reduction="sum") / pairs


def _angle_loss(s: Tensor, t: Tensor) -> Tensor:
    count = len(s)
    huber = F.smooth_l1_loss(_cosines(s), _cosines(t), reduction="none")
    same = torch.eye(count, dtype=torch.bool, device=s.device)
    distinct = ~(same[:, :, None] | same[:, None, :] | same[None, :, :])
    return (huber * distinct).sum() / (count * (count - 1) * (count - 2))


def _cosines(rows: Tensor) -> Tensor:
    """Return the cosine of the angle at j between i and k, `[j, i, k]`; 0 where a side is 0."""
    centred = rows - rows.mean(0)
    # (i − j)·(k − j) by products: differences of all pairs would take samples² · features.
    products = centred @ centred.T
    dots = (
        products[None, :, :]
        - products[:, :, None]
        - products[:, None, :]
        + products.diagonal()[:, None, None]
    )
    distances = _distances(rows)
    lengths = distances[:, :, None] * distances[:, None, :]
    apart = lengths > 0
    return torch.where(apart, dots / torch.where(apart, lengths, 1.0), 0.0)


def similarity_preserving(
    options: config.SimilarityPreserving, outcome: Outcome, progress: float
) -> Total:
    """Return 1/b² · ‖G_T − G_S‖²_F, times the number b of samples; the mean over taps.

    G is Q Qᵀ with rows scaled to length 1, Q `[b, features]` the flat tap (Tung and Mori, 2019,
    arXiv:1907.09682, section 3). Invariant to rotation and scale of either side.
    """
    totals: list[Total] = []
    for ours, theirs in tapped(options, outcome).values():
        s, t = embeddings(outcome, ours, theirs)
        difference = unit(t @ t.T) - unit(s @ s.T)
        totals.append((difference.square().sum() / max(len(s), 1), len(s)))
    return mean_over_taps(totals)


def cka(options: config.Cka, outcome: Outcome, progress: float) -> Total:
    """Return 1 − CKA, times the number of samples; the mean over taps.

    CKA = ⟨K, L⟩ / (‖K‖_F ‖L‖_F), K and L the centred matrices of products of both sides: the linear
    kernel of Kornblith et al., 2019, arXiv:1905.00414, section 3. Invariant to
    rotation and scale of either side. Samples that are all alike have loss 0.
    """
    totals: list[Total] = []
    for ours, theirs in tapped(options, outcome).values():
        s, t = embeddings(outcome, ours, theirs)
        k, m = (each @ each.T for each in (s - s.mean(0), t - t.mean(0)))
        own, other = k.square().sum(), m.square().sum()
        varies = (own > 0) & (other > 0)
        scale = torch.where(varies, own, 1.0).sqrt() * torch.where(varies, other, 1.0).sqrt()
        value = torch.where(varies, 1 - (k * m).sum() / scale, 0.0)
        totals.append((value * len(s), len(s)))
    return mean_over_taps(totals)
