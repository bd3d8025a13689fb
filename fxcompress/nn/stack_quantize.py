"""StackQuantize: the quantizer of a stack of matrices, such as those of experts.

Matrix e of `[matrices, rows, columns]` becomes what `FakeQuantize` with `bits[e]` makes of that
matrix alone, bit for bit. Matrices of one stack may have different widths, or stay as they are;
their integers start at 0, so that zero points say what is symmetric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from fxcompress.errors import UsageError
from fxcompress.nn._affine import grouped, in_place_of, ungrouped, wide
from fxcompress.nn.fake_quantize import FakeQuantize
from fxcompress.nn.packing import pack, packed_size, unpack

__all__ = ["StackQuantize"]


class StackQuantize(nn.Module):
    """Round each matrix of a stack to the values that integers of its width can hold.

    `scale` and `zero_point` (from 0) have the shape `[matrices, rows]`, with `group`
    `[matrices, rows, groups]`; a group is a run of a row, and the last may be shorter. The gradient
    passes straight through where a number is in range, and is 0 where it is clamped.

    Args:
        bits: Width of the integers, 2 to 8; one for each matrix where they differ, and 0 for a
            matrix that stays as it is.
        group: How many consecutive elements of a row share a scale; None for the whole row.
        shape: The shape of `scale` and `zero_point`.

    Raises:
        UsageError: The arguments contradict each other.
    """

    scale: Tensor
    zero_point: Tensor

    # The result has its operand's type: propagation over fake tensors need not run the arithmetic.
    keeps_type: ClassVar[bool] = True

    def __init__(
        self,
        bits: int | Sequence[int],
        *,
        group: int | None = None,
        shape: Sequence[int],
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if len(shape) != (2 if group is None else 3):
            raise UsageError(
                f"a scale of shape {list(shape)} does not fit group={group}",
                reason="it has an entry for each row of each matrix, or each group of each row",
            )
        widths = (bits,) * shape[0] if isinstance(bits, int) else tuple(bits)
        if len(widths) != shape[0]:
            raise UsageError(
                f"{len(widths)} widths for {shape[0]} matrices", reason="each matrix has one"
            )
        wrong = [width for width in widths if width and not 2 <= width <= 8]
        if wrong:
            raise UsageError(
                f"a matrix of a stack cannot have {wrong[0]} bits", reason="it has 2 to 8, or 0"
            )
        self.widths, self.group = widths, group
        self.register_buffer("scale", torch.ones(tuple(shape), device=device))
        self.register_buffer(
            "zero_point", torch.zeros(tuple(shape), dtype=torch.int32, device=device)
        )

    @property
    def bits(self) -> int | tuple[int, ...]:
        """The width of all matrices, or of each where they differ."""
        return self.widths[0] if len(set(self.widths)) == 1 else self.widths

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `scale`, as it is now."""
        return tuple(self.scale.shape)

    @property
    def parts(self) -> Mapping[int, list[int]]:
        """Width -> the matrices that have it, narrow ones first; 0 for those that stay."""
        return {
            width: [e for e, own in enumerate(self.widths) if own == width]
            for width in sorted(set(self.widths))
        }

    def forward(self, x: Tensor) -> Tensor:
        """Return the stack as its integers would give it back: same shape, same dtype."""
        level = self._levels(x.detach())
        q = torch.minimum(level.clamp(min=0), self._qmax())
        scale, zero_point = self._by_row()
        y = ungrouped((q - zero_point) * scale, self._rows(x).shape, self.group)
        y = self._stayed(x.detach(), y.reshape(x.shape).to(x.dtype))
        if not (torch.is_grad_enabled() and x.requires_grad):
            return y
        inside = ungrouped(level == q, self._rows(x).shape, self.group).reshape(x.shape)
        inside = self._stayed(torch.ones_like(inside), inside)
        return in_place_of(torch.where(inside, x, x.detach()), y)

    def quantize(self, x: Tensor) -> Tensor:
        """Return the integers from 0, as int32 of the shape of `x`; 0 for matrices that stay."""
        q = torch.minimum(self._levels(x).clamp(min=0), self._qmax())
        made = ungrouped(q, self._rows(x).shape, self.group).reshape(x.shape).to(torch.int32)
        return self._stayed(torch.zeros_like(made), made)

    def dequantize(self, q: Tensor, like: Tensor) -> Tensor:
        """Return the numbers that integers stand for, in the dtype of `like`.

        Matrices that stay are those of `like`.
        """
        scale, zero_point = self._by_row()
        rows = self._rows(q)
        y = (grouped(rows, self.group).float() - zero_point) * scale
        made = ungrouped(y, rows.shape, self.group).reshape(q.shape).to(like.dtype)
        return self._stayed(like, made)

    def store(self, x: Tensor) -> Tensor:
        """Return a stack as bytes: packed integers, width by width, and matrices that stay."""
        codes = self.quantize(x).to(torch.uint8)
        found = []
        for width, matrices in self.parts.items():
            if width:
                found.append(pack(codes[matrices], width))
            else:
                found.append(x[matrices].contiguous().view(torch.uint8).reshape(-1))
        return torch.cat(found)

    def restore(self, stored: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the stack that `store` was given, as its integers give it back.

        Raises:
            ValueError: There are not the bytes of such a stack.
        """
        each = torch.Size(shape[1:]).numel()
        codes = torch.zeros(tuple(shape), dtype=torch.int32, device=stored.device)
        stack = torch.zeros(tuple(shape), dtype=dtype, device=stored.device)
        start = 0
        for width, matrices in self.parts.items():
            count = len(matrices) * each
            end = start + (packed_size(count, width) if width else count * dtype.itemsize)
            part, some = stored[start:end], (len(matrices), *shape[1:])
            if len(part) != end - start:
                raise ValueError(f"{len(stored)} bytes are too few for a stack of {list(shape)}")
            if width:
                codes[matrices] = unpack(part, width, count).reshape(some).to(torch.int32)
            else:
                stack[matrices] = part.clone().view(dtype).reshape(some)
            start = end
        if start != len(stored):
            raise ValueError(f"{len(stored)} bytes are too many for a stack of {list(shape)}")
        return self.dequantize(codes, stack)

    def quantizer(self, matrices: Sequence[int]) -> FakeQuantize:
        """Return what does the same to the rows of some matrices of one width, one below another.

        Its integers are signed where all zero points are the middle.
        """
        width = self.widths[matrices[0]]
        scale, points = (each[list(matrices)].flatten(0, 1) for each in self._state())
        middle = 2 ** (width - 1)
        signed = bool((points == middle).all())
        made = FakeQuantize(
            width, signed=signed, symmetric=signed, axis=0, group=self.group, shape=scale.shape
        )
        made.scale = scale.clone()
        made.zero_point = points - middle if signed else points.clone()
        return made

    def select(self, matrices: Sequence[int]) -> StackQuantize:
        """Return the quantizer of some of the matrices, in their order."""
        scale, zero_point = (each[list(matrices)] for each in self._state())
        widths = [self.widths[e] for e in matrices]
        made = StackQuantize(widths, group=self.group, shape=scale.shape)
        made.scale, made.zero_point = scale, zero_point
        return made

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"bits={self.bits}, group={self.group}, shape={self.shape}"

    def _state(self) -> tuple[Tensor, Tensor]:
        return self.scale.detach(), self.zero_point.detach()

    def _rows(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])

    def _by_row(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point, shaped to broadcast against grouped rows."""
        shape = (-1, 1) if self.group is None else (-1, self.shape[2], 1)
        return self.scale.reshape(shape), self.zero_point.float().reshape(shape)

    def _levels(self, x: Tensor) -> Tensor:
        """Return integers as floats, not clamped."""
        scale, zero_point = self._by_row()
        return (wide(grouped(self._rows(x), self.group)) / scale).round() + zero_point

    def _qmax(self) -> Tensor:
        highest = [float(2**width - 1) for width in self.widths]
        each = torch.tensor(highest, device=self.scale.device).repeat_interleave(self.shape[1])
        return each.reshape((-1, 1) if self.group is None else (-1, 1, 1))

    def _stayed(self, x: Tensor, y: Tensor) -> Tensor:
        """Return `y` with the matrices that stay as they are in `x`."""
        if all(self.widths):
            return y
        rounded = torch.tensor([bool(width) for width in self.widths], device=y.device)
        return torch.where(rounded[:, None, None], y, x)
