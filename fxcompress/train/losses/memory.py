"""Contrastive representation distillation against a memory of all samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, distributed, nn

from fxcompress.errors import DataError, UsageError
from fxcompress.train import loss_config as config
from fxcompress.train.losses._outcome import Outcome, Total
from fxcompress.train.losses._rows import unit
from fxcompress.train.losses._taps import (
    Shapes,
    channels,
    embedded,
    mean_over_taps,
    tap_names,
    tapped,
)

__all__ = ["ContrastiveMemory"]


class ContrastiveMemory(nn.Module):
    """Tells a sample from others that a memory of the last embeddings holds.

    Each side's tap is averaged over its places, embedded by a linear head of its own and scaled to
    length 1: g_S and g_T. The memories M_S and M_T have a row for each of the N samples of the
    data. For sample i, j = i and K indices j drawn from all N alike,

        h(i, j) = e^{g_S(i)·M_T(j)/τ} / Z_T,  P(i, j) = h / (h + K/N)

    and the loss is −log P(i, i) − Σ_j log(1 − P(i, j)) over the K others, added to the same of g_T
    against M_S. Z is N times the mean of the first batch's exponentials, and stays. After that
    M(i) ← μ·M(i) + (1 − μ)·g(i), scaled to length 1. Tian et al., 2020, arXiv:1910.10699, equations
    10 to 19; memory and Z are those of Wu et al., 2018, arXiv:1805.01978, section 3.2.
    """

    def __init__(self, options: config.Crd, shapes: Shapes) -> None:
        super().__init__()
        self.names = tap_names(options, list(shapes))
        self.sides = nn.ModuleList()
        for name in self.names:
            for shape in shapes[name]:
                self.sides.append(_Side(channels(shape), options))

    def forward(self, options: config.Crd, outcome: Outcome, progress: float) -> Total:
        """Return the sum over samples, and their number.

        Raises:
            DataError: The targets do not say which samples these are.
            UsageError: There are several processes, each of which would have its own memory.
        """
        if distributed.is_available() and distributed.is_initialized():
            raise UsageError(
                "crd keeps a memory of samples, and there are several processes",
                reason="each would remember its own samples alone",
                hint="write `negatives: batch`",
            )
        found, samples = tapped(options, outcome), options.samples or 0
        totals: list[Total] = []
        for place, name in enumerate(self.names):
            own, other = cast(tuple[_Side, _Side], tuple(self.sides[2 * place : 2 * place + 2]))
            s, t, kept = embedded(outcome, found[name], (own.head, other.head))
            index = _index(outcome, samples, len(found[name][0]))
            index = index if kept is None else index[kept]
            drawn = torch.randint(samples, (len(index), options.count)).to(index.device)
            rows = torch.cat([index[:, None], drawn], 1)
            each = other.contrast(s, rows, options) + own.contrast(t, rows, options)
            # Batches may be run once more without gradients, to count: nothing is learned there.
            if torch.is_grad_enabled():
                own.remember(index, s.detach(), options.momentum)
                other.remember(index, t.detach(), options.momentum)
            totals.append((each.sum(), len(each)))
        return mean_over_taps(totals)


class _Side(nn.Module):
    """The head of one side, the memory of its embeddings, and what comparing with them gives."""

    memory: Tensor
    constant: Tensor

    def __init__(self, width: int, options: config.Crd) -> None:
        super().__init__()
        self.head = nn.Linear(width, options.dim)
        rows = torch.randn(options.samples or 0, options.dim)
        self.register_buffer("memory", unit(rows))
        self.register_buffer("constant", torch.zeros(()))

    def contrast(self, embedded: Tensor, rows: Tensor, options: config.Crd) -> Tensor:
        """Return −log P − Σ log(1 − P) of each sample, `[samples]`.

        Args:
            embedded: Of the other side, `[samples, dim]`.
            rows: Which rows it is compared with, the sample's own first, `[samples, 1 + K]`.
            options: Temperature and numbers.
        """
        total = len(self.memory)
        # A copy: the memory is written before the backward pass reads it.
        scores = (embedded @ self.memory.clone().T).gather(1, rows) / options.temperature
        shares = scores.exp()
        if not self.constant and torch.is_grad_enabled():
            self.constant.copy_(shares.detach().mean() * total)
        constant = self.constant if self.constant else shares.detach().mean() * total
        logits = scores - constant.log() - torch.tensor(options.count / total).log()
        return -(
            nn.functional.logsigmoid(logits[:, 0]) + nn.functional.logsigmoid(-logits[:, 1:]).sum(1)
        )

    def remember(self, index: Tensor, embedded: Tensor, momentum: float) -> None:
        """Move rows of the memory towards what was embedded now."""
        moved = momentum * self.memory[index] + (1 - momentum) * embedded
        self.memory[index] = unit(moved)


def _index(outcome: Outcome, samples: int, rows: int) -> Tensor:
    target = outcome.target
    index = target.get("index") if isinstance(target, Mapping) else None
    if not isinstance(index, Tensor) or index.shape != (rows,) or index.is_floating_point():
        raise DataError(
            "crd does not know which samples these are",
            reason="with `negatives: memory` each sample has a number of its own",
            hint="let the split yield targets {labels, index}, or write `negatives: batch`",
        )
    if rows and not (0 <= int(index.min()) and int(index.max()) < samples):
        raise DataError(
            f"a sample's number is none of the {samples} that crd has room for",
            reason=f"numbers go from {int(index.min())} to {int(index.max())}",
            hint="write `samples:` as the split has",
        )
    return index
