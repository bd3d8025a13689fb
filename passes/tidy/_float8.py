"""Weights as 8-bit floats with a scale per channel: which, and why others stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fxcompress.nn import FloatQuantize
from fxcompress.rewrite.edits import Declined
from passes._layers.quantizer import insert_quantizer
from passes._paths import free_path, path_beside
from passes.quantize._weight_only.layers import Weight, choose
from passes.quantize.weight_only import WeightOnlyOptions
from passes.tidy._ranges import finite_extent, too_small
from passes.tidy.cast import CastDecision, Float8Weight

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter
    from passes.tidy.cast import CastOptions

__all__ = ["decide", "insert_float8"]


def decide(program: Program, options: CastOptions) -> CastDecision:
    """Return the decision of `tidy.cast` to an 8-bit float."""
    names = ("targets", "types", "exclude", "expect")
    selection: dict[str, Any] = {name: getattr(options, name) for name in names}
    found = choose(
        program,
        WeightOnlyOptions(**selection, bits=8, group=None, symmetric=True, embeddings=True),
    )
    state = program.state()
    taken = {name for name, _ in program.module.named_modules()} | set(state)
    entries, scales = [], {}
    declined = [each for each in found.declined if each.reason != "it is not selected"]
    for weight in found.weights:
        value = state[weight.tensor].detach()
        names_ = tuple(found.ids[node] for node in weight.readers)
        largest = weight.rows(value.float()).abs().amax(dim=1)
        module = FloatQuantize(_format(options.dtype), axis=weight.axis, shape=largest.shape)
        if not value.is_meta:
            module.fit(largest)
            reason = _underflow(weight, value, module, options)
            if reason is not None:
                declined += [Declined(node=name, reason=reason) for name in names_]
                continue
        path = free_path(_path(weight), taken)
        taken.add(path)
        entries.append(
            Float8Weight(
                path=path,
                tensor=weight.tensor,
                layers=names_,
                axis=weight.axis,
                shape=tuple(largest.shape),
            )
        )
        if not value.is_meta:
            scales[path] = module.scale
    return CastDecision(
        dtype=options.dtype,
        weights=tuple(entries),
        declined=tuple(declined),
        arrays=dict(scales),
    )


def _underflow(
    weight: Weight, value: Tensor, module: FloatQuantize, options: CastOptions
) -> str | None:
    scaled = value.float() / module.scale_for(value)
    extent = finite_extent(weight.tensor, scaled, module.smallest)
    return too_small(f"{weight.tensor} / scale", extent, options.underflow, options.dtype)


def _path(weight: Weight) -> str:
    reader = weight.readers[0]
    if reader.op == "call_module":
        return path_beside(str(reader.target), "_weight_fp8")
    return path_beside(weight.tensor, "_fp8")


def _format(dtype: str) -> Literal["e4m3", "e5m2"]:
    return "e4m3" if dtype == "float8_e4m3" else "e5m2"


def insert_float8(rewriter: GraphRewriter, decision: CastDecision) -> None:
    """Insert the quantizers, and set the weights to what they give back."""
    for entry in decision.weights:
        module = FloatQuantize(_format(decision.dtype), axis=entry.axis, shape=entry.shape)
        if entry.path in decision.arrays:
            module.scale.copy_(torch.as_tensor(decision.arrays[entry.path]))
        readers = [rewriter.node(layer) for layer in entry.layers]
        insert_quantizer(rewriter, module, entry.path, entry.tensor, readers)
        value = rewriter.get_tensor(entry.tensor).detach()
        rewriter.set_tensor(entry.tensor, module(value), tied=True)
