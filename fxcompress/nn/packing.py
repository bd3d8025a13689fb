"""Small integers in bytes: what weights of 2 to 8 bits are stored as.

The bits of a number are cut into fields of 8, 4, 2 and 1 bits (3 = 2 + 1, 5 = 4 + 1), the widest
and lowest first. All fields of one width stand together, 8 / width to a byte, the first in the
lowest bits. So every width takes bits / 8 bytes a number.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack", "packed_size", "unpack"]


def pack(values: Tensor, bits: int) -> Tensor:
    """Return integers 0 … 2^bits - 1 of any shape as bytes, uint8 `[packed_size]`."""
    flat = values.reshape(-1).to(torch.uint8)
    parts = []
    for width, shift in _fields(bits):
        per_byte = 8 // width
        field = (flat >> shift) & (2**width - 1)
        padded = torch.nn.functional.pad(field, (0, -len(field) % per_byte))
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=flat.device)
        # Fields do not overlap, so the sum is their union.
        parts.append((padded.reshape(-1, per_byte) << shifts).sum(dim=1).to(torch.uint8))
    return torch.cat(parts)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the first `count` integers of `pack`, uint8 `[count]`."""
    start = 0
    values: Tensor | None = None
    for width, shift in _fields(bits):
        length = -(-count * width // 8)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
        fields = (packed[start : start + length, None] >> shifts) & (2**width - 1)
        shifted = fields.reshape(-1)[:count] << shift
        values = shifted if values is None else values | shifted
        start += length
    assert values is not None, "every width has a field"
    return values


def packed_size(count: int, bits: int) -> int:
    """Return how many bytes `count` integers take."""
    return sum(-(-count * width // 8) for width, _ in _fields(bits))


def _fields(bits: int) -> list[tuple[int, int]]:
    """Return (width, shift) of each field, the widest and lowest first."""
    if not 1 <= bits <= 8:
        raise ValueError(f"{bits} bits do not fit a byte")
    found, shift = [], 0
    for width in (8, 4, 2, 1):
        if bits - shift >= width:
            found.append((width, shift))
            shift += width
    return found
