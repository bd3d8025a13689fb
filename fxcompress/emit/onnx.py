"""The `onnx` format: torch's dynamo exporter, QDQ pairs that onnxruntime runs in integers."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from pathlib import Path
from typing import Any, Final

import torch
from torch import fx

from fxcompress.emit._artifact import Written
from fxcompress.emit._dynamic import write_dynamic
from fxcompress.emit._export import export_program
from fxcompress.emit._extras import need_onnx
from fxcompress.emit._job import Job
from fxcompress.emit._lower import ONNXRUNTIME, Lowered, lower
from fxcompress.emit._lower_nbits import NBits, lower_nbits
from fxcompress.emit._plain import PlainProgram, plain_program
from fxcompress.emit.kernels import (
    CONVOLUTION_KERNELS,
    LINEAR_KERNELS,
    RECURRENT_KERNELS,
    integer_kernels,
)
from fxcompress.errors import EmitError
from fxcompress.ir.ops import op_name

__all__ = ["write"]

_RESHAPES: Final = frozenset({"reshape", "view", "flatten"})
_MOVES: Final = frozenset({"transpose", "permute", "sdpa", "movedim", "expand"})
_SYMBOL: Final = re.compile(r"[A-Za-z_]\w*")
# A protobuf message ends at 2 GB; weights beyond this go to a file of their own.
_INLINE_BYTES: Final = 1_500_000_000


def write(job: Job) -> Written:
    """Export the program and save the model.

    Raises:
        EmitError: The exporter refuses the graph.
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
    """
    need_onnx()
    plain = plain_program(job.program)
    chosen = job.options.onnx
    nbits = lower_nbits(plain.module, chosen.activations) if job.quantized else NBits()
    lowered = _lower(plain.module) if job.quantized else None
    _keep_reshapes(plain.module)
    exported = export_program(plain, job.program.dims, job.example)
    model = _translate(plain, exported.program, chosen.opset)
    _strip(model)
    _name_sizes(model, plain)
    name = job.file("onnx")
    files = _save(model, job.stage, name)
    notes = [f"inputs {', '.join(_names(model.graph.inputs))}; "
             f"outputs {', '.join(_names(model.graph.outputs))}"]  # fmt: skip
    if lowered is not None:
        notes += [*_kernel_notes(job.stage / name, lowered), *lowered.notes]
        notes += nbits.notes(chosen.activations)
    if plain.flattened:
        notes.append(f"outputs of {', '.join(plain.flattened)} are named by field")
    return Written(files, (*notes, *exported.notes))


def _lower(module: fx.GraphModule) -> Lowered:
    """Lower what is quantised at run time, then the rest."""
    dynamic = write_dynamic(module)
    lowered = lower(module, "decomposed", ONNXRUNTIME)
    for kind in ("convolutions", "linears", "recurrent"):
        setattr(lowered, kind, getattr(lowered, kind) + getattr(dynamic, kind))
    lowered.notes[:0] = dynamic.notes
    return lowered


def _keep_reshapes(module: fx.GraphModule) -> None:
    """Copy what a transposition hands to a reshape; ONNX has no strides, so the copy vanishes.

    torch.export makes a reshape a view where the strides allow it. The exporter then decomposes
    attention into ops with other strides, and the view fails.
    """
    for node in list(module.graph.nodes):
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or op_name(node) not in _RESHAPES:
            continue
        if op_name(source) in _MOVES:
            with module.graph.inserting_before(node):
                copied = module.graph.call_function(
                    torch.clone, (source,), {"memory_format": torch.contiguous_format}
                )
            copied.meta = dict(source.meta)
            node.replace_input_with(source, copied)
    module.recompile()


def _translate(plain: PlainProgram, program: torch.export.ExportedProgram, opset: int) -> Any:
    from fxcompress.emit._onnx_ops import translations

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            made = torch.onnx.export(
                program,
                dynamo=True,
                input_names=[tensor.name for tensor in plain.signature.inputs],
                output_names=list(plain.outputs),
                opset_version=opset,
                custom_translation_table=dict(translations(program)),
                verbose=False,
            )
        except Exception as error:
            raise EmitError(
                "torch.onnx cannot translate the program",
                reason=_reason(error),
                hint="emit it as `pt2`, or try another opset",
            ) from error
    assert made is not None, "the exporter returns the model unless given a path"
    return made.model


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"


def _strip(model: Any) -> None:
    """Remove source paths and other traces of the machine, so equal programs give equal bytes."""
    model.doc_string = None
    model.metadata_props.clear()
    model.producer_version = None
    functions = [function.graph for function in model.functions.values()]
    for graph in [model.graph, *functions]:
        graph.doc_string = None
        graph.metadata_props.clear()
        for node in graph.all_nodes() if hasattr(graph, "all_nodes") else graph:
            node.doc_string = None
            node.metadata_props.clear()
            for value in node.outputs:
                value.doc_string = None
                value.metadata_props.clear()
        for value in [*graph.inputs, *graph.initializers.values()]:
            value.doc_string = None
            value.metadata_props.clear()


def _name_sizes(model: Any, plain: PlainProgram) -> None:
    """Call dynamic sizes what the program calls them, not by the exporter's symbols."""
    import onnx_ir

    names: dict[str, str] = {}
    by_name = {tensor.name: tensor.shape for tensor in plain.signature.inputs}
    for value in model.graph.inputs:
        for size, name in zip(value.shape or (), by_name.get(value.name, ()), strict=False):
            if isinstance(name, str) and isinstance(size, onnx_ir.SymbolicDim):
                names[str(size.value)] = name
    values = [v for node in model.graph for v in node.outputs]
    for value in [*model.graph.inputs, *values]:
        if value.shape is None or value.shape.is_static():
            continue
        sizes = list(value.shape)
        for place, size in enumerate(sizes):
            if isinstance(size, onnx_ir.SymbolicDim) and size.value is not None:
                text = _SYMBOL.sub(lambda m: names.get(m[0], m[0]), size.value)
                sizes[place] = onnx_ir.SymbolicDim(text)
        # A new one: what several values share cannot be changed.
        value.shape = onnx_ir.Shape(sizes)


def _save(model: Any, stage: Path, name: str) -> tuple[str, ...]:
    import onnx_ir

    total = sum(v.const_value.nbytes for v in model.graph.initializers.values())
    if total <= _INLINE_BYTES:
        onnx_ir.save(model, stage / name)
        return (name,)
    data = f"{name}.data"
    onnx_ir.save(model, stage / name, external_data=data)
    return name, data


def _names(values: Any) -> list[str]:
    return [str(value.name) for value in values]


def _kernel_notes(path: Path, lowered: Lowered) -> list[str]:
    kernels = integer_kernels(path)
    parts = []
    for kind, total, names in (
        ("convolutions", lowered.convolutions, CONVOLUTION_KERNELS),
        ("linear layers", lowered.linears, LINEAR_KERNELS),
        ("recurrent layers", lowered.recurrent, RECURRENT_KERNELS),
    ):
        if total:
            count = sum(kernels[name] for name in names)
            parts.append(f"{count} of {total} {kind} run as integer kernels in onnxruntime")
    listed = ", ".join(f"{count} {name}" for name, count in sorted(kernels.items()))
    return [*parts, f"integer kernels: {listed or 'none'}"]
