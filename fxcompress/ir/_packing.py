"""Weights in files as the integers that they stand for.

A weight that its quantizer reads back bit for bit is stored as packed integers of its width, and
made again when the file is read: the program in memory is the same. Zero points take one byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxcompress.ir._encode import decode
from fxcompress.ir.modules import ModuleConfig
from fxcompress.nn import FakeQuantize
from fxcompress.nn.packing import pack, packed_size, unpack

if TYPE_CHECKING:
    from fxcompress.ir.program import Program

__all__ = ["pack_weights", "unpack_weights"]

_BITS = 8


def pack_weights(
    program: Program, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors to store, and what a document must say to get the given ones back.

    The second is empty where nothing is packed.
    """
    stored = dict(tensors)
    weights: dict[str, str] = {}
    points: list[str] = []
    for name, path, quantizer in _quantizers(program):
        zero_point = f"{path}.zero_point"
        if zero_point in stored and zero_point not in points:
            stored[zero_point] = stored[zero_point].to(quantizer.dtype)
            points.append(zero_point)
        weight = tensors.get(name)
        if weight is None or name in weights:
            continue
        integers = quantizer.quantize(weight)
        if _same_bits(quantizer.dequantize(integers, weight.dtype), weight):
            stored[name] = pack((integers - quantizer.qmin).to(torch.uint8), quantizer.bits)
            weights[name] = path
    return stored, {"weights": weights, "zero_points": points} if points else {}


def unpack_weights(document: Mapping[str, Any], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a document from those that were stored.

    Raises:
        ValueError: A packed weight does not have the bytes of its shape.
    """
    tensors = dict(stored)
    packed = document.get("packed", {})
    for name in packed.get("zero_points", ()):
        tensors[name] = tensors[name].to(torch.int32)
    for name, path in packed.get("weights", {}).items():
        written = document["modules"][path]
        kwargs = {key: decode(value, _no_node) for key, value in written["kwargs"].items()}
        quantizer = ModuleConfig(written["class"], kwargs).build("cpu")
        assert isinstance(quantizer, FakeQuantize), "only its weights are packed"
        quantizer.scale.copy_(tensors[f"{path}.scale"])
        quantizer.zero_point.copy_(tensors[f"{path}.zero_point"])
        shape = document["tensors"][name]["shape"]
        dtype = getattr(torch, document["tensors"][name]["dtype"])
        count = torch.Size(shape).numel()
        if tensors[name].numel() != packed_size(count, quantizer.bits):
            raise ValueError(f"{name} does not have the bytes of {count} packed integers")
        integers = unpack(tensors[name], quantizer.bits, count).to(torch.int32)
        tensors[name] = quantizer.dequantize((integers + quantizer.qmin).reshape(shape), dtype)
    return tensors


def _no_node(index: int) -> Any:
    raise ValueError("a quantizer of the saved program refers to a node")


def _quantizers(program: Program) -> Iterator[tuple[str, str, FakeQuantize]]:
    """Yield canonical parameter, path and module of every fixed quantizer on a parameter."""
    for node in program.graph.find_nodes(op="get_attr"):
        name = program.ties.get(str(node.target), str(node.target))
        for user in node.users:
            if user.op != "call_module":
                continue
            module = program.module.get_submodule(str(user.target))
            if isinstance(module, FakeQuantize) and _fixed(module):
                yield name, str(user.target), module


def _fixed(quantizer: FakeQuantize) -> bool:
    trained = any(True for _ in quantizer.parameters())
    return not trained and quantizer.bits <= _BITS and not quantizer.scale.is_meta


def _same_bits(made: Tensor, given: Tensor) -> bool:
    # -0.0 equals 0.0 and is another number of a file.
    return torch.equal(made.contiguous().view(torch.uint8), given.contiguous().view(torch.uint8))
