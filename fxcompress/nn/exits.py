"""Exit: the answer of an early exit where it is sure, that of what comes after it elsewhere."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["Exit", "uncertainty"]


def uncertainty(logits: Tensor, criterion: Literal["entropy", "probability"]) -> Tensor:
    """Return how unsure logits `[batch, classes]` are, `[batch]` from 0 to 1, in float32.

    `entropy` is −Σ p · log p / log C, from log-softmax, so that no exponential overflows; classes
    with a logit of −∞ add nothing. `probability` is 1 minus the largest p.
    """
    logs = torch.log_softmax(logits.float(), dim=-1)
    shares = logs.exp()
    if criterion == "probability":
        return 1.0 - shares.amax(-1)
    terms = torch.where(shares > 0.0, shares * logs, 0.0)
    return -terms.sum(-1) / math.log(max(int(logits.shape[-1]), 2))


class Exit(nn.Module):
    """Choose, sample by sample, between an early answer and a later one.

    A sample's answer is that of the first exit that is sure of it, whatever else is in its batch.
    Here both are there already; formats that can branch compute the later one only if some sample
    of the batch needs it. Sources: Teerapittayanon et al., BranchyNet, 2016 (arXiv:1709.01686,
    algorithm 1); Xin et al., DeeBERT, 2020 (arXiv:2004.12993, section 3.3).

    Args:
        name: What the exit is called.
        threshold: The exit is taken where the uncertainty is below it: 0 never takes it.
        criterion: What uncertainty is, as `uncertainty` has it.
    """

    def __init__(
        self,
        name: str,
        threshold: float,
        criterion: Literal["entropy", "probability"] = "entropy",
    ) -> None:
        super().__init__()
        self.name, self.threshold, self.criterion = name, threshold, criterion

    def sure(self, logits: Tensor) -> Tensor:
        """Return for which samples of `[batch, classes]` the exit is taken, `[batch]`."""
        return uncertainty(logits, self.criterion) < self.threshold

    def forward(self, input: Tensor, other: Tensor) -> Tensor:
        """Return `input`, the early logits `[batch, classes]`, or `other`, the later ones."""
        return torch.where(self.sure(input).unsqueeze(-1), input, other)

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"{self.name!r}, threshold={self.threshold}, criterion={self.criterion!r}"
