"""Write a safetensors file tensor by tensor, so that the state is never in memory twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch

__all__ = ["write_tensors"]

# Names of the safetensors format, https://github.com/huggingface/safetensors
_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16",
    torch.uint16: "U16", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32",
    torch.uint32: "U32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
    torch.uint64: "U64", torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Write tensors as safetensors, in a fixed order; return the file's SHA-256.

    Only one tensor at a time is copied (where it is not contiguous or not on the CPU).

    Raises:
        OSError: The file cannot be written.
    """
    header: dict[str, object] = {}
    offset = 0
    # Wide types first keep every tensor aligned; readers map the file.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in names:
        tensor = tensors[name]
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sha = hashlib.sha256()
    with path.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            sha.update(part)
            file.write(part)
        for name in names:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            data = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
            sha.update(data)
            file.write(data)
    return sha.hexdigest()
