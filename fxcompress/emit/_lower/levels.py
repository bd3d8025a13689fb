"""Weights of one bit and of 8-bit floats, and signs, as what a form of the lowering knows.

`storage` and `arithmetic` hold a bit, or a byte, for each number. In the `decomposed` form a binary
weight is the 8-bit integers ±1 with a scale, which every runtime reads; 8-bit floats are pairs of
quantize and dequantize for who fuses those (TensorRT). None of them multiplies bits or, on these
processors, 8-bit floats: they compute in float.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import Tensor, fx, nn

from fxcompress.emit._levels import (
    BinaryWeight,
    CodebookWeight,
    Float8Pair,
    Float8Rounding,
    Float8Weight,
    Signs,
)
from fxcompress.emit._lower.graph import is_weight, tensor_at
from fxcompress.emit._lower.targets import Target
from fxcompress.errors import EmitError
from fxcompress.nn import Binarize, Codebook, FakeQuantize, FloatQuantize

if TYPE_CHECKING:
    from fxcompress.emit._lower.stored import Lowered

__all__ = ["write_levels"]


def write_levels(
    module: fx.GraphModule,
    form: Literal["arithmetic", "decomposed", "storage"],
    done: Lowered,
    target: Target,
) -> None:
    """Replace every Binarize, Codebook and FloatQuantize, in place.

    Raises:
        EmitError: The target cannot take one of them.
    """
    sources: set[str] = set()
    counts = {Binarize: 0, Codebook: 0, FloatQuantize: 0, Signs: 0, Float8Rounding: 0}
    pairs = form == "decomposed" and target.pairs
    if form == "decomposed":
        _check_floats(module, target)
    for node in list(module.graph.nodes):
        found = _level_of(module, node)
        path = str(node.target)
        if path in sources:
            # The quantizer of a tied weight, called on it again.
            _read(module, node, path)
        elif isinstance(found, (Binarize, Codebook, FloatQuantize)) and is_weight(node):
            source = cast(fx.Node, node.args[0])
            weight = tensor_at(module, str(source.target)).detach()
            counts[type(found)] += 1
            sources.add(path)
            _store(module, path, found, weight, form, pairs=pairs, exported=target.exported)
            _read(module, node, path)
        elif isinstance(found, FloatQuantize):
            counts[Float8Rounding] += 1
            like = node.meta["val"]
            rounding = Float8Pair(found, None, like.dtype) if pairs else Float8Rounding(found, like)
            module.set_submodule(path, rounding)
        elif isinstance(found, Binarize):
            counts[Signs] += 1
            if Signs.fit(found):
                module.set_submodule(path, Signs())
    done.notes += _notes(counts, form)


def _level_of(module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _store(
    module: fx.GraphModule,
    path: str,
    found: Binarize | Codebook | FloatQuantize,
    weight: Tensor,
    form: str,
    *,
    pairs: bool,
    exported: bool,
) -> None:
    """Put what gives a weight in the place of its quantizer, and beside it what it reads."""
    if isinstance(found, FloatQuantize):
        stored = Float8Pair(found, weight, weight.dtype) if pairs else Float8Weight(found, weight)
        module.set_submodule(path, stored)
        return
    if isinstance(found, Codebook):
        packed = form != "decomposed"
        book = CodebookWeight(found, weight, packed=packed, exported=exported)
        module.set_submodule(path, book)
        return
    fixed = copy.deepcopy(found).freeze(weight)
    if form != "decomposed":
        module.set_submodule(path, BinaryWeight(fixed, weight))
        return
    assert fixed.scale is not None, "it is frozen"
    fake = FakeQuantize(2, narrow=True, axis=fixed.axis, shape=fixed.shape)
    module.set_submodule(path, fake.fit(-fixed.scale, fixed.scale))
    values = nn.Module()
    values.register_buffer("weight", fixed(weight))
    module.set_submodule(f"{path}_values", values)


def _read(module: fx.GraphModule, node: fx.Node, path: str) -> None:
    """Let a call of what replaced a quantizer read what it needs: nothing, or the values."""
    if not isinstance(module.get_submodule(path), FakeQuantize):
        node.args = ()
        return
    with module.graph.inserting_before(node):
        values = module.graph.get_attr(f"{path}_values.weight")
    values.meta = dict(cast(fx.Node, node.args[0]).meta)
    node.args = (values,)


def _notes(counts: dict[Any, int], form: str) -> list[str]:
    notes = []
    if counts[Binarize]:
        how = "as 8-bit integers ±1" if form == "decomposed" else "in 1 bit each, packed in bytes"
        notes.append(f"{counts[Binarize]} binary weights are stored {how}")
    if counts[Codebook]:
        how = "a byte each" if form == "decomposed" else "packed in bytes"
        notes.append(
            f"{counts[Codebook]} weights are stored as indices into codebooks, {how}; "
            "layers compute with the floats that they stand for"
        )
    if counts[Signs]:
        notes.append(f"{counts[Signs]} activations are signs, ±1 in float")
    if counts[Binarize] or counts[Signs]:
        notes.append("binary layers are computed in float: no runtime has kernels for bits")
    if counts[FloatQuantize]:
        notes.append(
            f"{counts[FloatQuantize]} weights are stored as 8-bit floats and computed with in float"
        )
    if counts[Float8Rounding]:
        notes.append(
            f"{counts[Float8Rounding]} activations are rounded to 8-bit floats; this processor has "
            "no kernels that multiply them"
        )
    return notes


def _check_floats(module: fx.GraphModule, target: Target) -> None:
    """Refuse 8-bit floats that a runtime cannot take.

    Raises:
        EmitError: There are some.
    """
    found = {
        str(node.target): each.format
        for node in module.graph.nodes
        if isinstance(each := _level_of(module, node), FloatQuantize)
        and each.format not in target.floats
    }
    if found:
        first, format_ = next(iter(found.items()))
        able = " and ".join(f"float8_{each}" for each in target.floats) or "8-bit integers"
        raise EmitError(
            f"{target.name} cannot take {len(found)} quantizers of float8_{format_}",
            reason=f"of 8 bits it takes {able}",
            hint="quantise to that, or emit onnx for onnxruntime, pt2, openvino or inductor",
            where=first,
        )
