"""Exit: the answer of an early exit where it is sure, that of what comes after it elsewhere."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["Exit", "Undecided", "uncertainty"]


def uncertainty(logits: Tensor, criterion: Literal["entropy", "probability"]) -> Tensor:
    """Return how unsure logits `[batch, classes]` are, `[batch]` from 0 to 1, in float32.

    `entropy` is −Σ p · log p / log C, from log-softmax, so that no exponential overflows; classes
    with a logit of −∞ add nothing. `probability` is 1 minus the largest p.
    """
    # A cast to the same type would be two operators of an exported file.
    values = logits if logits.dtype == torch.float32 else logits.float()
    logs = torch.log_softmax(values, dim=-1)
    shares = logs.exp()
    if criterion == "probability":
        return 1.0 - shares.amax(-1)
    terms = torch.where(shares > 0.0, shares * logs, 0.0)
    return -terms.sum(-1) / math.log(max(int(logits.shape[-1]), 2))


class Exit(nn.Module):
    """Choose, sample by sample, between an early answer and a later one.

    A sample's answer is that of the first exit that is sure of it, whatever else is in its batch.
    Here both are there already; formats that can branch compute the later one only for samples that
    need it, or only if some sample of the batch does. Sources: Teerapittayanon et al., BranchyNet,
    2016 (arXiv:1709.01686, algorithm 1); Xin et al., DeeBERT, 2020 (arXiv:2004.12993, section 3.3).

    Args:
        name: What the exit is called.
        threshold: The exit is taken where the uncertainty is below it: 0 never takes it.
        criterion: What uncertainty is, as `uncertainty` has it.
        batch: What formats that can branch do with a batch. `each`: samples that stop leave it, and
            the rest of the network runs on the others. `together`: it stops once all may.
    """

    def __init__(
        self,
        name: str,
        threshold: float,
        criterion: Literal["entropy", "probability"] = "entropy",
        batch: Literal["each", "together"] = "together",
    ) -> None:
        super().__init__()
        self.name, self.threshold, self.criterion = name, threshold, criterion
        self.batch = batch

    def sure(self, logits: Tensor) -> Tensor:
        """Return for which samples of `[batch, classes]` the exit is taken, `[batch]`."""
        return uncertainty(logits, self.criterion) < self.threshold

    def forward(self, input: Tensor, other: Tensor) -> Tensor:
        """Return `input`, the early logits `[batch, classes]`, or `other`, the later ones."""
        return torch.where(self.sure(input).unsqueeze(-1), input, other)

    def extra_repr(self) -> str:
        """Return the arguments."""
        return (
            f"{self.name!r}, threshold={self.threshold}, criterion={self.criterion!r}, "
            f"batch={self.batch!r}"
        )


class Undecided(nn.Module):
    """Tell which samples of a batch go on after an exit: those that it is not sure of.

    Args:
        threshold: As of `Exit`.
        criterion: As of `Exit`.
    """

    def __init__(self, threshold: float, criterion: Literal["entropy", "probability"]) -> None:
        super().__init__()
        self.threshold, self.criterion = threshold, criterion

    def forward(self, input: Tensor) -> Tensor:
        """Return their numbers, `[n]` in int64 and ascending, for logits `[batch, classes]`."""
        sure = uncertainty(input, self.criterion) < self.threshold
        # Not `>=`: logits with a NaN go on.
        return torch.nonzero(~sure).squeeze(1)

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"threshold={self.threshold}, criterion={self.criterion!r}"
