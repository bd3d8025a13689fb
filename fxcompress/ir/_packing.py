"""Weights in files as the few bits that they stand for.

A weight that its quantizer reads back bit for bit is stored as packed integers of its width (an
8-bit float as its byte), and made again when the file is read: the program in memory is the same.
Zero points take one byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from fxcompress.ir._encode import decode
from fxcompress.ir.modules import ModuleConfig
from fxcompress.nn import Binarize, Codebook, FakeQuantize, FloatQuantize, StackQuantize
from fxcompress.nn.packing import pack, packed_size, unpack

if TYPE_CHECKING:
    from fxcompress.ir.program import Program

__all__ = ["pack_weights", "unpack_weights"]

_BITS = 8

_OneWidth: TypeAlias = Binarize | Codebook | FakeQuantize | FloatQuantize
Quantizer: TypeAlias = _OneWidth | StackQuantize


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
        known = zero_point not in stored or zero_point in points
        if isinstance(quantizer, (FakeQuantize, StackQuantize)) and not known:
            small = quantizer.dtype if isinstance(quantizer, FakeQuantize) else torch.uint8
            stored[zero_point] = stored[zero_point].to(small)
            points.append(zero_point)
        weight = tensors.get(name)
        if weight is None or name in weights:
            continue
        bytes_ = _stored(quantizer, weight)
        if _same_bits(_restored(name, quantizer, bytes_, weight.shape, weight.dtype), weight):
            stored[name] = bytes_
            weights[name] = path
    found = {"weights": weights, "zero_points": points}
    return stored, found if weights or points else {}


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
        assert isinstance(quantizer, Quantizer), "only their weights are packed"
        quantizer.load_state_dict(
            {name: tensors[f"{path}.{name}"] for name in quantizer.state_dict()}
        )
        shape = document["tensors"][name]["shape"]
        dtype = getattr(torch, document["tensors"][name]["dtype"])
        tensors[name] = _restored(name, quantizer, tensors[name], shape, dtype)
    return tensors


def _stored(quantizer: Quantizer, weight: Tensor) -> Tensor:
    if isinstance(quantizer, StackQuantize):
        return quantizer.store(weight)
    return pack(_codes(quantizer, weight), _width(quantizer))


def _restored(
    name: str, quantizer: Quantizer, stored: Tensor, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    if isinstance(quantizer, StackQuantize):
        return quantizer.restore(stored, shape, dtype)
    count, width = torch.Size(shape).numel(), _width(quantizer)
    if stored.numel() != packed_size(count, width):
        raise ValueError(f"{name} does not have the bytes of {count} packed integers")
    return _values(quantizer, unpack(stored, width, count).reshape(tuple(shape)), dtype)


def _width(quantizer: _OneWidth) -> int:
    if isinstance(quantizer, (Codebook, FakeQuantize)):
        return quantizer.bits
    return 1 if isinstance(quantizer, Binarize) else _BITS


def _codes(quantizer: _OneWidth, weight: Tensor) -> Tensor:
    """Return what is packed, uint8 of the shape of `weight`."""
    if isinstance(quantizer, FakeQuantize):
        return (quantizer.quantize(weight) - quantizer.qmin).to(torch.uint8)
    if isinstance(quantizer, Codebook):
        return quantizer.indices(weight)
    return quantizer.quantize(weight).view(torch.uint8)


def _values(quantizer: _OneWidth, codes: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(quantizer, FakeQuantize):
        return quantizer.dequantize(codes.to(torch.int32) + quantizer.qmin, dtype)
    if isinstance(quantizer, FloatQuantize):
        codes = codes.view(quantizer.dtype)
    return quantizer.dequantize(codes, dtype)


def _no_node(index: int) -> Any:
    raise ValueError("a quantizer of the saved program refers to a node")


def _quantizers(program: Program) -> Iterator[tuple[str, str, Quantizer]]:
    """Yield canonical parameter, path and module of every fixed quantizer on a parameter."""
    for node in program.graph.find_nodes(op="get_attr"):
        name = program.ties.get(str(node.target), str(node.target))
        for user in node.users:
            if user.op != "call_module":
                continue
            module = program.module.get_submodule(str(user.target))
            if isinstance(module, Quantizer) and _fixed(module):
                yield name, str(user.target), module


def _fixed(quantizer: Quantizer) -> bool:
    if isinstance(quantizer, Codebook):
        # Membership is fixed; the values that are trained are not what is packed.
        return not quantizer.anchors.is_meta
    if quantizer.scale is None or quantizer.scale.is_meta:
        return False
    trained = any(True for _ in quantizer.parameters())
    if isinstance(quantizer, StackQuantize):
        return not trained
    return not trained and _width(quantizer) <= _BITS


def _same_bits(made: Tensor, given: Tensor) -> bool:
    # -0.0 equals 0.0 and is another number of a file.
    return torch.equal(made.contiguous().view(torch.uint8), given.contiguous().view(torch.uint8))
