"""How far a quantised layer's outputs lie from the float model's, channel by channel."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from passes.quantize._scaling.moments import Moments

__all__ = ["Difference"]

# Places of a batch that are looked at one by one.
_PLACES: Final = 2048
# A place is far out when its squared error is so many times that of the place in the middle.
_FAR: Final = 10.0
# The mean does harm when it raises the squared error of the place in the middle so far.
_HARM: Final = 1.01


class Difference:
    """Means of both outputs over all places, and the errors of some places drawn at random.

    The mean error is the shift that leaves the least squared error, and a few places decide it
    where they are far out: one clipped token of a sentence may hold all of a layer's error. Taking
    their mean out of the bias moves every other place away from where it was.

    Args:
        name: Of the layer, for messages.
        dim: The dimension of its channels.
    """

    def __init__(self, name: str, dim: int) -> None:
        self.wanted, self.got, self.dim = Moments(name, dim), Moments(name, dim), dim
        self._errors: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(0)

    def update(self, wanted: Any, got: Any, real: Tensor | None = None) -> None:
        """Take in what both models give for one batch; `real` as in `Moments.update`.

        Raises:
            NumericsError: It holds a NaN or an infinity.
        """
        self.wanted.update(wanted, real)
        self.got.update(got, real)
        errors = (wanted - got).detach().movedim(self.dim, -1)
        if real is not None and self.dim == -1 and real.shape == errors.shape[:-1]:
            errors = errors[real != 0]
        errors = errors.reshape(-1, errors.shape[-1]).float().cpu()
        if len(errors) > _PLACES:
            errors = errors[torch.randperm(len(errors), generator=self._generator)[:_PLACES]]
        self._errors.append(errors)

    def shift(self) -> tuple[Tensor, bool]:
        """Return what to add to the bias, `[channels]`, and whether places were left out.

        It is the mean of wanted - got; where that would raise the error of most places, it is the
        mean of those that are not far out.
        """
        mean = self.wanted.mean - self.got.mean
        errors = torch.cat(self._errors).double()
        before, after = _sizes(errors), _sizes(errors - mean)
        if not len(errors) or after.median() <= _HARM * before.median():
            return mean, False
        near = errors[before <= _FAR * before.median()]
        return near.mean(dim=0), True


def _sizes(errors: Tensor) -> Tensor:
    return errors.square().sum(dim=1)
