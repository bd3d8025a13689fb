"""Contrastive representation distillation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxcompress.errors import UsageError
from fxcompress.train import loss_config as config
from fxcompress.train.losses._outcome import Outcome, Total
from fxcompress.train.losses._rows import labels_of
from fxcompress.train.losses._taps import (
    Shapes,
    channels,
    embedded,
    mean_over_taps,
    tap_names,
    tapped,
)

__all__ = ["ContrastiveHeads"]


class ContrastiveHeads(nn.Module):
    """Tells a sample's teacher embedding from those of other samples, and the other way round.

    Each side's tap is averaged over its places, embedded by a linear head of its own and scaled to
    length 1: g_S and g_T (Tian et al., 2020, arXiv:1910.10699, equation 19). With
    c_ij = g_S(i)·g_T(j) / τ, the loss is −½ Σ_i [log(e^{c_ii} / Σ_j e^{c_ij}) +
    log(e^{c_ii} / Σ_j e^{c_ji})]: the softmax over the batch of van den Oord et al., 2018,
    arXiv:1807.03748, equation 4, which bounds the same mutual information. Negatives are the other
    samples of the batch (`ContrastiveMemory` keeps others). With `negatives: other_classes`,
    samples of the same label are no negatives.
    """

    def __init__(self, options: config.Crd, shapes: Shapes) -> None:
        super().__init__()
        self.ours, self.theirs = nn.ModuleList(), nn.ModuleList()
        self.names = tap_names(options, list(shapes))
        for name in self.names:
            for heads, shape in zip((self.ours, self.theirs), shapes[name], strict=True):
                heads.append(nn.Linear(channels(shape), options.dim))

    def forward(self, options: config.Crd, outcome: Outcome, progress: float) -> Total:
        """Return the sum over samples, and their number."""
        found = tapped(options, outcome)
        totals: list[Total] = []
        for name, own, other in zip(self.names, self.ours, self.theirs, strict=True):
            if name not in found:
                raise UsageError(
                    f"the loss crd was built for a tap {name} that is not there", where=name
                )
            s, t, kept = embedded(outcome, found[name], (own, other))
            scores = s @ t.T / options.temperature
            scores = scores.masked_fill(self._left_out(options, outcome, kept, scores), -1e30)
            each = scores.logsumexp(0) + scores.logsumexp(1) - 2 * scores.diagonal()
            totals.append((each.sum() / 2, len(each)))
        return mean_over_taps(totals)

    @staticmethod
    def _left_out(
        options: config.Crd, outcome: Outcome, kept: Tensor | None, scores: Tensor
    ) -> Tensor:
        """Return which pairs are no negatives, `[samples, samples]`."""
        same = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
        if options.negatives == "batch":
            return torch.zeros_like(same)
        labels = labels_of(outcome.target)
        if labels.dim() != 1 or labels.is_floating_point():
            raise UsageError(
                "negatives of other classes need a class for each sample",
                reason=f"the targets are {tuple(labels.shape)}",
                hint="write `negatives: batch`",
            )
        labels = labels if kept is None else labels[kept]
        return (labels[:, None] == labels) & ~same
