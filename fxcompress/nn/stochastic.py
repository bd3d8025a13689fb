"""Modules that act while training only: stochastic depth, and a number that follows `.training`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["LayerDrop", "StochasticDepth", "TrainingSwitch"]


class StochasticDepth(nn.Module):
    """Zero whole samples of a residual branch at random while training.

    The draws are those of the libraries' own modules, so that a seeded training run of a captured
    model takes the same course as the original's. Source: Huang et al., Deep Networks with
    Stochastic Depth, 2016.

    Args:
        p: Probability that a sample is zeroed.
        mode: `row` draws for every sample, `batch` once for all.
        scale: Whether what is kept is divided by `1 - p`.
        noise: `bernoulli` draws as torchvision and timm do, `uniform` as Hugging Face does.
    """

    def __init__(
        self,
        p: float = 0.0,
        mode: Literal["row", "batch"] = "row",
        scale: bool = True,
        noise: Literal["bernoulli", "uniform"] = "bernoulli",
    ) -> None:
        super().__init__()
        self.p, self.mode, self.scale, self.noise = p, mode, scale, noise

    def forward(self, input: Tensor) -> Tensor:
        """Return `input` `[batch, …]`, some samples zeroed while training."""
        if not self.training or self.p == 0.0:
            return input
        keep = 1.0 - self.p
        rows = input.shape[0] if self.mode == "row" else 1
        shape = (rows,) + (1,) * (input.dim() - 1)
        if self.noise == "uniform":
            mask = torch.rand(shape, dtype=input.dtype, device=input.device).add(keep).floor()
            return (input / keep if self.scale and keep > 0.0 else input) * mask
        mask = torch.empty(shape, dtype=input.dtype, device=input.device).bernoulli_(keep)
        if self.scale and keep > 0.0:
            mask = mask / keep
        return input * mask

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"p={self.p}, mode={self.mode!r}, scale={self.scale}, noise={self.noise!r}"


class LayerDrop(nn.Module):
    """Let what a block reads stand for what it makes, at random while training.

    In evaluation, and for what is kept, the block's result passes unchanged: nothing is scaled.
    Source: Fan et al., Reducing Transformer Depth on Demand with Structured Dropout, 2019
    (arXiv:1909.11556, section 3).

    Args:
        p: Probability that a block is passed by.
        mode: `row` draws for every sample, `batch` once for all.
    """

    def __init__(self, p: float = 0.0, mode: Literal["row", "batch"] = "batch") -> None:
        super().__init__()
        self.p, self.mode = p, mode

    def forward(self, input: Tensor, other: Tensor) -> Tensor:
        """Return `other`, what the block makes, or while training `input` instead, what it reads.

        Both are `[batch, …]` and of one shape.
        """
        if not self.training or self.p == 0.0:
            return other
        rows = input.shape[0] if self.mode == "row" else 1
        shape = (rows,) + (1,) * (input.dim() - 1)
        passed = torch.rand(shape, device=input.device) < self.p
        return torch.where(passed, input, other)

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"p={self.p}, mode={self.mode!r}"


class TrainingSwitch(nn.Module):
    """A number that is one thing while training and another in evaluation.

    It stands for an argument such as attention's `dropout_p` that the original model's code takes
    from `self.training`.

    Args:
        training_value: Its value while training.
        eval_value: Its value in evaluation.
    """

    def __init__(self, training_value: float | bool, eval_value: float | bool) -> None:
        super().__init__()
        self.training_value, self.eval_value = training_value, eval_value

    def forward(self) -> float | bool:
        """Return the number of the present mode."""
        return self.training_value if self.training else self.eval_value

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"training_value={self.training_value}, eval_value={self.eval_value}"
