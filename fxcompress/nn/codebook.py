"""Codebook: weights that share a few values (Han et al., 2015, "Deep Compression", 1510.00149).

A weight is read as the entry of a codebook that it belongs to. Which one that is stays fixed: the
nearest of the `anchors`, the entries as k-means left them. The entries themselves train, with
∂L/∂c_k = Σ ∂L/∂w over the members of k (section 3.3, eq. 3). Where a number is stored, it takes
⌈log2 entries⌉ bits.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from fxcompress.errors import UsageError
from fxcompress.nn._affine import wide

__all__ = ["Codebook"]


class Codebook(nn.Module):
    """Replace each number by the codebook entry that it belongs to.

    Args:
        entries: How many values a codebook has, 2 to 256.
        groups: How many codebooks there are.
        axis: The dimension that is cut into groups; None with one codebook for all.
        rows: So many neighbours along `axis` share a codebook; the last group may have fewer.

    Attributes:
        anchors: What membership goes by: ascending, `[groups, entries]`, a buffer.
        codebook: The values, `[groups, entries]`, a parameter. That of an anchor of exactly 0 is 0
            whatever training makes of it, so that sparse weights stay sparse.

    Raises:
        UsageError: The arguments contradict each other.
    """

    anchors: Tensor

    # The result has its operand's type: propagation over fake tensors need not run the arithmetic.
    keeps_type: ClassVar[bool] = True

    def __init__(
        self,
        entries: int = 16,
        *,
        groups: int = 1,
        axis: int | None = None,
        rows: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not 2 <= entries <= 256:
            raise UsageError(f"a codebook of {entries} entries", reason="there are 2 to 256")
        if axis is None and groups != 1:
            raise UsageError(f"{groups} codebooks without an axis", reason="they need one")
        self.entries, self.groups, self.axis, self.rows = entries, groups, axis, rows
        values = torch.arange(entries, dtype=torch.float32, device=device).repeat(groups, 1)
        self.register_buffer("anchors", values)
        self.codebook = nn.Parameter(values.clone())

    @property
    def bits(self) -> int:
        """Bits of an index."""
        return (self.entries - 1).bit_length()

    def fit(self, values: Tensor) -> Codebook:
        """Take ascending values `[groups, entries]` as anchors and codebook; return self."""
        with torch.no_grad():
            self.anchors.copy_(values)
            self.codebook.copy_(values)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return the entries of `x`: same shape, same dtype. No gradient reaches `x`."""
        return self.look_up(self.indices(x.detach()), self.table()).to(x.dtype)

    def table(self) -> Tensor:
        """Return the values as they count, `[groups, entries]`."""
        return torch.where(self.anchors == 0, torch.zeros_like(self.codebook), self.codebook)

    def indices(self, x: Tensor) -> Tensor:
        """Return the entry that each number belongs to: uint8 of the shape of `x`."""
        rows = self._rows(wide(x)).double()
        anchors = self._per_row(self.anchors.double(), len(rows))
        # In float64 the middle of two float32 numbers is exact, and neither of them.
        middles = ((anchors[:, 1:] + anchors[:, :-1]) / 2).contiguous()
        found = torch.searchsorted(middles, rows.contiguous())
        return self._shaped(found, x).to(torch.uint8)

    def look_up(self, indices: Tensor, table: Tensor) -> Tensor:
        """Return the values of indices, of their shape; `table` is `[groups, entries]`."""
        rows = self._rows(indices).long()
        if self.axis is None:
            return self._shaped(table[0][rows], indices)
        return self._shaped(self._per_row(table, len(rows)).gather(1, rows), indices)

    def dequantize(self, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the anchors of indices: what a weight is when it is stored as indices."""
        return self.look_up(indices, self.anchors).to(dtype)

    def _rows(self, x: Tensor) -> Tensor:
        """Return `[1, elements]`, or `[size of the axis, elements]`."""
        return x.reshape(1, -1) if self.axis is None else x.movedim(self.axis, 0).flatten(1)

    def _per_row(self, table: Tensor, rows: int) -> Tensor:
        return table if self.axis is None else table.repeat_interleave(self.rows, 0)[:rows]

    def _shaped(self, rows: Tensor, like: Tensor) -> Tensor:
        if self.axis is None:
            return rows.reshape(like.shape)
        moved = like.movedim(self.axis, 0).shape
        return rows.reshape(moved).movedim(0, self.axis)

    def extra_repr(self) -> str:
        """Return the entries and what shares them."""
        axis = f", groups={self.groups}, axis={self.axis}" if self.axis is not None else ""
        return f"{self.entries}" + axis + f", rows={self.rows}" * (self.rows != 1)
