"""Which tokens of a sequence go through a block, and how a router hears of its choice."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor, nn

__all__ = ["RouteGradient", "TopTokens"]


class TopTokens(nn.Module):
    """Choose the tokens with the largest scores, or in causal inference those likely to have them.

    While training, and where `causal` is False, that are the k = ⌈capacity · tokens⌉ largest scores
    of a sequence. Whether a token is among them depends on those after it, so that a causal model
    in evaluation takes, from the first on, tokens whose `likely` is above 0, until it has k; and
    all that are left, once there are no more of them than room. Source: Raposo et al.,
    Mixture-of-Depths, 2024 (arXiv:2404.02258, sections 3.3 and 3.5), but for that rest.

    Args:
        capacity: Share of the tokens that go through.
        causal: Whether evaluation goes by `likely`.
        start: The capacity at the start of a training; it falls in a line.
        until: The share of the training after which it is `capacity`.
    """

    def __init__(
        self, capacity: float, causal: bool = False, start: float | None = None, until: float = 0.5
    ) -> None:
        super().__init__()
        self.capacity, self.causal, self.start, self.until = capacity, causal, start, until
        # How much of a training is done; the loop sets it.
        self.progress = 1.0

    @property
    def now(self) -> float:
        """The capacity at this point of a training; in evaluation the final one."""
        if not self.training or self.start is None:
            return self.capacity
        done = min(1.0, self.progress / self.until) if self.until > 0 else 1.0
        return self.start + (self.capacity - self.start) * done

    def count(self, tokens: int) -> int:
        """Return k for a number of tokens, which may be symbolic."""
        share = Fraction(self.now).limit_denominator(1000)
        return (tokens * share.numerator + share.denominator - 1) // share.denominator

    def forward(self, input: Tensor, other: Tensor) -> Tensor:
        """Return the places of the chosen tokens, in order: `[batch, k]`.

        Args:
            input: Scores, `[batch, tokens]`.
            other: `likely`, the logits of being chosen, `[batch, tokens]`.
        """
        tokens = input.shape[1]
        count = self.count(tokens)
        if self.causal and not self.training:
            places = torch.arange(tokens, device=input.device)
            likely = other > 0
            room = count - (likely.cumsum(1) - likely.to(torch.int64))
            taken = (likely & (room > 0)) | (tokens - places <= room)
            # Those that pass by go behind all others, which leaves the order as it is.
            return torch.where(taken, places, places + tokens).sort(dim=1).values[:, :count]
        return input.topk(count, dim=1).indices.sort(dim=1).values

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"{self.capacity}, causal={self.causal}, start={self.start}, until={self.until}"


class RouteGradient(nn.Module):
    """Let the loss tell a router what its choice was worth, and change nothing else.

    While training it computes y + (σ(s) − c)·(y − x), where c has the value of σ(s) and no
    gradient: that is y, and the gradient of s is σ'(s) times that of the block's share. In
    evaluation it is y.
    """

    def forward(self, score: Tensor, input: Tensor, other: Tensor) -> Tensor:
        """Return `other`, what the block makes.

        Args:
            score: Of the chosen tokens, `[batch, k, 1]`.
            input: What the block reads, `[batch, k, width]`.
            other: What it makes of it.
        """
        if not self.training:
            return other
        gate = score.sigmoid()
        return other + (gate - gate.detach()) * (other - input)
