"""Convolutions as depthwise-separable ones: kernels of each channel by SVD, a mix of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

import torch
from torch import Tensor

from passes._choices.budget import steps
from passes.factorize._kernels.choose import Ranks
from passes.factorize._kernels.decide import Method
from passes.factorize._kernels.layers import Kernel, named
from passes.factorize._kernels.model import Part

if TYPE_CHECKING:
    from fxcompress.pipeline.context import Context
    from passes.factorize._svd.spectrum import Moments
    from passes.factorize.depthwise import DepthwiseOptions

__all__ = ["Channels", "DepthwiseMethod"]

_UNSEEN: Final = 1e-6
"""Of the mean second moment: what directions that calibration never saw count."""

_ROUNDING: Final = 1e-12
"""An energy of 1 is all but what rounding made of zeros."""


@dataclass(frozen=True)
class Channels:
    """The best kernels of each input channel, the strongest first.

    Attributes:
        weight: W, `[out, in, taps]`.
        left: Orthonormal columns for each channel, `[in, out, full]`.
        energies: What each adds to the channel's energy, `[in, full]`.
        second: The second moment of patches, `[in · taps, in · taps]`; None for the identity.
        mean: Of the patches, `[in, taps]`, where the bias takes up what is lost of it.
    """

    weight: Tensor
    left: Tensor
    energies: Tensor
    second: Tensor | None
    mean: Tensor | None

    def lost(self, ranks: Ranks) -> float:
        """Return the part of the channels' energies that a multiplier loses."""
        total = float(self.energies.sum())
        return float(self.energies[:, ranks[0] :].sum()) / total if total > 0 else 0.0

    def least(self, energy: float) -> int:
        """Return the least multiplier that keeps this part."""
        kept = self.energies.sum(0).cumsum(0)
        wanted = min(energy, 1.0 - _ROUNDING) * kept[-1]
        return min(int((kept < wanted).sum()) + 1, len(kept))

    def factors(self, ranks: Ranks) -> tuple[Tensor, Tensor]:
        """Return P `[out, in, m]` and D `[in, m, taps]`."""
        up = self.left[:, :, : ranks[0]]
        down = up.transpose(1, 2) @ self.weight.movedim(1, 0)
        plain = up.movedim(1, 0)
        return (plain if self.second is None else plain + self._correction(plain, down)), down

    def _correction(self, up: Tensor, down: Tensor) -> Tensor:
        """Return what makes P best with a D, all channels together: E·S·Dᵀ·(D·S·Dᵀ)⁻¹.

        E is what P and D leave of W, so that nothing is corrected where they leave nothing.
        """
        assert self.second is not None, "else channels do not depend on one another"
        channels, rank, taps = down.shape
        left = self.weight - torch.einsum("oij,ijt->oit", up, down)
        # D is block diagonal: a product for each channel.
        half = (down @ self.second.reshape(channels, taps, -1)).reshape(channels * rank, -1)
        gram = (down @ half.T.reshape(channels, taps, -1)).reshape(channels * rank, -1)
        # Of several best ones the least: kernels may be 0, and inputs never seen.
        wanted = half @ left.flatten(1).T
        found: Tensor = torch.linalg.lstsq(gram, wanted, driver="gelsd").solution
        return found.T.reshape(-1, channels, rank)

    def approximate(self, ranks: Ranks) -> Tensor:
        """Return the weight of a multiplier, `[out, in, taps]`."""
        return torch.einsum("oij,ijt->oit", *self.factors(ranks))

    def tensors(self, ranks: Ranks) -> Mapping[str, Tensor]:
        """Return the weights of both parts, and what the bias gains."""
        up, down = self.factors(ranks)
        found = {"depth.weight": down.flatten(0, 1), "point.weight": up.flatten(1)}
        if self.mean is not None:
            lost = self.weight - torch.einsum("oij,ijt->oit", up, down)
            found["shift"] = torch.einsum("oit,it->o", lost, self.mean)
        return found

    def error(self, made: Tensor) -> float:
        """Return the part of the energy that a weight in the place of W loses."""
        total = self._energy(self.weight)
        return self._energy(self.weight - made) / total if total > 0 else 0.0

    def _energy(self, weight: Tensor) -> float:
        flat = weight.flatten(1)
        return float(((flat if self.second is None else flat @ self.second) * flat).sum())


class DepthwiseMethod(Method):
    """A depthwise convolution with m outputs for each channel, and one of kernel 1."""

    name: ClassVar = "factorize.depthwise"
    suffix: ClassVar = "_ds"
    unit: ClassVar = "multiplier"

    def __init__(self, options: DepthwiseOptions) -> None:
        self.options = self.selection = options
        self.budget, self.calibration = options.budget, options.calibration
        self.measures = options.sensitivity == "output"
        self.reads_inputs = options.whiten == "inputs"

    def given(self, kernels: Sequence[Kernel]) -> dict[str, Ranks]:
        """Return path -> multiplier for the convolutions that are named."""
        found = named(kernels, self.options.multipliers, "multipliers")
        return {path: (multiplier,) for path, multiplier in found.items()}

    def full(self, kernel: Kernel) -> Ranks:
        """Return the rank of a channel's filters at most."""
        return (min(kernel.outputs, kernel.taps),)

    def parts(self, kernel: Kernel, ranks: Ranks) -> tuple[Part, ...]:
        """Return the depthwise convolution and that of kernel 1."""
        wide = kernel.inputs * ranks[0]
        return (
            kernel.spatial("depth", kernel.inputs, wide, groups=kernel.inputs),
            kernel.pointwise("point", wide, kernel.outputs),
        )

    def choices(self, kernel: Kernel) -> tuple[Ranks, ...]:
        """Return the multipliers that save weights."""
        most = (kernel.outputs * kernel.taps - 1) // (kernel.taps + kernel.outputs)
        most = min(most, self.full(kernel)[0])
        return tuple((m,) for m in steps(most)) if most else ()

    @torch.no_grad()
    def decompose(
        self, kernel: Kernel, value: Tensor, moments: Moments | None, context: Context
    ) -> Channels:
        """Return the kernels of each input channel."""
        weight = kernel.tensor(value)
        whitened = weight.movedim(1, 0)
        second = mean = None
        if moments is not None:
            centred = kernel.layer.bias is not None
            found = moments.second(centred=centred)
            found.diagonal().add_(_UNSEEN * float(found.diagonal().mean()))
            # Columns of a layer's matrix run over taps and, innermost, over channels.
            sizes = (kernel.taps, kernel.inputs)
            ordered = found.reshape(*sizes, *sizes).permute(1, 0, 3, 2)
            own = torch.diagonal(ordered, dim1=0, dim2=2).movedim(-1, 0)
            values, vectors = torch.linalg.eigh(own)
            whitened = whitened @ (vectors * values.clamp_min(0).sqrt().unsqueeze(1))
            second = ordered.reshape(found.shape)
            mean = moments.mean.reshape(sizes).T if centred else None
        left, singular, _ = torch.linalg.svd(whitened, full_matrices=False)
        return Channels(weight, left, singular.square(), second, mean)

    def wanted(self, kernel: Kernel, found: object) -> Ranks | None:
        """Return the multiplier that the options ask for."""
        if self.options.multiplier is not None:
            return (self.options.multiplier,)
        if self.options.energy is None:
            return None
        if isinstance(found, Channels):
            return (found.least(self.options.energy),)
        choices = self.choices(kernel)
        return choices[len(choices) // 2] if choices else None

    @property
    def asked(self) -> str:
        """What every convolution should have."""
        if self.options.multiplier is not None:
            return f"multiplier {self.options.multiplier}"
        return ""

    @property
    def pending(self) -> bool:
        """Whether multipliers depend on weights."""
        return self.options.energy is not None
