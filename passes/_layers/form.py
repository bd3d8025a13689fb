"""How a weight of any layer is a stack of matrices: `[groups, out, taps, in]`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Form"]


class Form(BaseModel):
    """Which dimension of a weight is what.

    A weight is `groups` matrices, each `[out, taps · in]`: one for a linear layer, one per group of
    a convolution, one per expert of stacked weights. A row makes one output; its columns run over
    the taps of the kernel and, innermost, over the input channels.

    Attributes:
        out: Dimension of the output channels.
        input: Dimension of the input channels.
        taps: Dimensions of the kernel, in order.
        stack: Dimension of the experts.
        groups: Groups of a convolution.
        split: The dimension whose entries belong to different groups: `out`, or `input` where the
            convolution is transposed.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    out: int
    input: int
    taps: tuple[int, ...] = ()
    stack: int | None = None
    groups: int = 1
    split: int | None = None

    def matrices(self, weight: Tensor) -> Tensor:
        """Return `weight` as `[groups, out, taps, in]`; a view where the weight is contiguous."""
        from torch import unflatten

        leading = () if self.stack is None else (self.stack,)
        found = weight.permute(*leading, self.out, self.input, *self.taps)
        found = found if leading else found.unsqueeze(0)
        found = found.flatten(3) if self.taps else found.unsqueeze(-1)
        if self.groups > 1:
            place = 0 if self.split == self.out else 1
            found = unflatten(found.squeeze(0), place, (self.groups, -1)).movedim(place, 0)
        return found.transpose(-1, -2)

    def rows(self, weight: Tensor) -> Tensor:
        """Return `weight` as `[groups, out, taps · in]`."""
        return self.matrices(weight).flatten(2)

    def weight(self, rows: Tensor, like: Tensor) -> Tensor:
        """Return `[groups, out, taps · in]` as a weight shaped like `like`."""
        made = like.new_empty(like.shape, dtype=rows.dtype)
        view = self.matrices(made)
        view.copy_(rows.reshape(view.shape))
        return made
