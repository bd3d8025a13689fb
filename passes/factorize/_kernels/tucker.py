"""Tucker-2: orthonormal bases of input and output channels, and the kernel between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Final

import torch
from torch import Tensor

from passes._choices.budget import steps
from passes.factorize._kernels.choose import Ranks, cheaper
from passes.factorize._kernels.decide import Method
from passes.factorize._kernels.layers import Kernel, named
from passes.factorize._kernels.model import Part
from passes.factorize._kernels.vbmf import noise_rank
from passes.factorize._kernels.vectors import left_vectors

if TYPE_CHECKING:
    from fxcompress.pipeline.context import Context
    from passes.factorize._svd.spectrum import Moments
    from passes.factorize.tucker import TuckerOptions

__all__ = ["Bases", "TuckerMethod"]

_ROUNDING: Final = 1e-12
_SETTLED: Final = 1e-6
"""Of the energy: a round of improvement that brings less is the last."""

_SIDE: Final = 8
"""Ranks of each side that a budget picks from."""


@dataclass(frozen=True)
class Bases:
    """The principal directions of input and output channels.

    Attributes:
        weight: W, `[out, in, taps]`.
        iterations: Rounds of improvement at most.
    """

    weight: Tensor
    iterations: int

    @cached_property
    def sides(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Of inputs and of outputs: orthonormal columns and singular values, the largest first."""
        inputs, outputs = _leading(self.weight.movedim(1, 0)), _leading(self.weight)
        return inputs, outputs

    def lost(self, ranks: Ranks) -> float:
        """Return a bound of the part of ‖W‖² that ranks lose: what either side loses alone."""
        total = float(self.weight.square().sum())
        gone = sum(
            float(values[rank:].square().sum())
            for (_, values), rank in zip(self.sides, ranks, strict=True)
        )
        return min(gone / total, 1.0) if total > 0 else 0.0

    def least(self, energy: float) -> Ranks:
        """Return the least ranks that keep this part, each side losing half of the rest."""
        found = []
        for _, values in self.sides:
            kept = values.square().cumsum(0)
            wanted = (1 - max((1 - energy) / 2, _ROUNDING)) * kept[-1]
            found.append(min(int((kept < wanted).sum()) + 1, len(kept)))
        return tuple(found)

    def standing_out(self) -> Ranks:
        """Return how many directions of each side stand out of the noise, at least one."""
        outputs, inputs, _ = self.weight.shape
        return tuple(
            max(1, noise_rank(values, size, self.weight.numel() // size))
            for (_, values), size in zip(self.sides, (inputs, outputs), strict=True)
        )

    def factors(self, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
        """Return V `[in, a]`, G `[b, a, taps]` and U `[out, b]`."""
        (v, _), (u, _) = self.sides
        v, u = v[:, : ranks[0]], u[:, : ranks[1]]
        whole = all(rank == side[0].shape[1] for rank, side in zip(ranks, self.sides, strict=True))
        energy = -1.0
        for _ in range(0 if whole else self.iterations):
            v = _leading(torch.einsum("oit,ob->ibt", self.weight, u))[0][:, : ranks[0]]
            u = _leading(torch.einsum("oit,ia->oat", self.weight, v))[0][:, : ranks[1]]
            now = float(self._core(v, u).square().sum())
            if now - energy <= _SETTLED * now:
                break
            energy = now
        return v, self._core(v, u), u

    def _core(self, v: Tensor, u: Tensor) -> Tensor:
        return torch.einsum("oit,ia,ob->bat", self.weight, v, u)

    def approximate(self, ranks: Ranks) -> Tensor:
        """Return the weight at some ranks, `[out, in, taps]`."""
        v, core, u = self.factors(ranks)
        return torch.einsum("ob,bat,ia->oit", u, core, v)

    def tensors(self, ranks: Ranks) -> Mapping[str, Tensor]:
        """Return the weights of the three parts."""
        v, core, u = self.factors(ranks)
        return {"inputs.weight": v.T, "core.weight": core, "outputs.weight": u}

    def error(self, made: Tensor) -> float:
        """Return the part of ‖W‖² that a weight in its place loses."""
        total = float(self.weight.square().sum())
        return float((self.weight - made).square().sum()) / total if total > 0 else 0.0


def _leading(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the left singular vectors of the first unfolding, and its singular values."""
    return left_vectors(tensor.flatten(1))


class TuckerMethod(Method):
    """A convolution of kernel 1, one of the layer's kernel, and one of kernel 1."""

    name: ClassVar = "factorize.tucker"
    suffix: ClassVar = "_tucker"
    unit: ClassVar = "ranks"

    def __init__(self, options: TuckerOptions) -> None:
        self.options = self.selection = options
        self.budget, self.calibration = options.budget, options.calibration
        self.measures = options.sensitivity == "output"

    def given(self, kernels: Sequence[Kernel]) -> dict[str, Ranks]:
        """Return path -> ranks for the convolutions that are named."""
        return dict(named(kernels, self.options.ranks, "ranks"))

    def full(self, kernel: Kernel) -> Ranks:
        """Return the ranks of both unfoldings at most."""
        inputs, outputs, taps = kernel.inputs, kernel.outputs, kernel.taps
        return min(inputs, outputs * taps), min(outputs, inputs * taps)

    def parts(self, kernel: Kernel, ranks: Ranks) -> tuple[Part, ...]:
        """Return the three convolutions."""
        return (
            kernel.pointwise("inputs", kernel.inputs, ranks[0]),
            kernel.spatial("core", ranks[0], ranks[1]),
            kernel.pointwise("outputs", ranks[1], kernel.outputs),
        )

    def choices(self, kernel: Kernel) -> tuple[Ranks, ...]:
        """Return pairs of ranks that save weights."""
        multiple = self.options.round_to
        sides = [steps(most, multiple) for most in self.full(kernel)]
        few = [side[:: max(1, len(side) // _SIDE)] for side in sides]
        pairs = ((a, b) for a in few[0] for b in few[1])
        return tuple(pair for pair in pairs if cheaper(kernel, self.parts(kernel, pair)))

    def decompose(
        self, kernel: Kernel, value: Tensor, moments: Moments | None, context: Context
    ) -> Bases:
        """Return the principal directions of channels."""
        return Bases(kernel.tensor(value), self.options.iterations)

    def wanted(self, kernel: Kernel, found: object) -> Ranks | None:
        """Return the ranks that the options ask for."""
        full, options = self.full(kernel), self.options
        if options.ratio is not None:
            ratio = options.ratio
            asked = tuple(max(1, round(ratio * n)) for n in (kernel.inputs, kernel.outputs))
        elif isinstance(found, Bases) and options.energy is not None:
            asked = found.least(options.energy)
        elif isinstance(found, Bases) and options.vbmf:
            asked = found.standing_out()
        elif options.vbmf or options.energy is not None:
            asked = tuple(-(-most // 2) for most in full)
        else:
            return None
        multiple = options.round_to
        return tuple(
            min(-(-rank // multiple) * multiple, most)
            for rank, most in zip(asked, full, strict=True)
        )

    @property
    def asked(self) -> str:
        """What every convolution should have."""
        return "" if self.options.ratio is None else f"a ratio of {self.options.ratio:.4g}"

    @property
    def pending(self) -> bool:
        """Whether ranks depend on weights."""
        return self.options.energy is not None or self.options.vbmf
