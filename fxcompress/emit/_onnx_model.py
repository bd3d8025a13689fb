"""From a program to an ONNX model in memory, which the ONNX and OpenVINO formats save."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import fx

from fxcompress.emit._exit_forms import ExitForm, with_exits
from fxcompress.emit._export import export_program
from fxcompress.emit._job import Job
from fxcompress.emit._lower import Lowered
from fxcompress.emit._onnx_codebooks import release_indices
from fxcompress.emit._onnx_lower import OnnxTarget, lower_for
from fxcompress.emit._onnx_simplify import simplify
from fxcompress.emit._plain import PlainProgram, plain_program
from fxcompress.errors import EmitError
from fxcompress.ir.ops import op_name

__all__ = ["OnnxModel", "onnx_model", "save_model"]

_RESHAPES: Final = frozenset({"reshape", "view", "flatten"})
_MOVES: Final = frozenset({"transpose", "permute", "sdpa", "movedim", "expand"})
_SYMBOL: Final = re.compile(r"[A-Za-z_]\w*")
# A protobuf message ends at 2 GB; weights beyond this go to a file of their own.
_INLINE_BYTES: Final = 1_500_000_000


@dataclass(frozen=True)
class OnnxModel:
    """An ONNX model and what was done to make it.

    Attributes:
        model: The `onnx_ir.Model`.
        plain: The graph that was exported.
        lowered: What was quantised; None for a program in float.
        notes: On sizes and names.
    """

    model: Any
    plain: PlainProgram
    lowered: Lowered | None
    notes: tuple[str, ...]


def onnx_model(
    job: Job, target: OnnxTarget, *, opset: int = 20, activations: str = "float32"
) -> OnnxModel:
    """Lower for `target`, export and translate.

    Args:
        job: The program.
        target: Who will read the file.
        opset: Version of the ONNX operator set.
        activations: What layers compute with whose weights alone are quantised.

    Raises:
        EmitError: The exporter refuses the graph, or the target cannot take it.
    """
    plain = plain_program(job.program)
    _check_types(plain.module, target)
    lowered = lower_for(plain.module, target, activations) if job.quantized else None
    _keep_reshapes(plain.module)
    exits: tuple[str, ...] = ()

    def made(own: PlainProgram) -> tuple[Any, tuple[str, ...]]:
        exported = export_program(own, job.program.dims, job.example)
        return _translate(own, exported.program, opset), exported.notes

    if target == "onnxruntime":
        # On a batch of none its Reshape fails, so what follows an exit is always a branch.
        forms: tuple[ExitForm, ...] = ("branches", "together")
        (model, sizes), exits = with_exits(plain, job.example, forms, made)
    else:
        model, sizes = made(plain)
    _strip(model)
    _name_sizes(model, plain)
    notes = [*sizes, *exits]
    if plain.flattened:
        notes.insert(0, f"outputs of {', '.join(plain.flattened)} are named by field")
    return OnnxModel(model, plain, lowered, tuple(notes))


def _check_types(module: fx.GraphModule, target: OnnxTarget) -> None:
    """Refuse what onnxruntime, which every ONNX file is run by, has no kernels for.

    Raises:
        EmitError: A tensor is in bfloat16.
    """
    tensors = (*module.named_parameters(), *module.named_buffers())
    found = [name for name, tensor in tensors if tensor.dtype == torch.bfloat16]
    if found and target != "openvino":
        raise EmitError(
            "onnxruntime runs no bfloat16 model on a CPU",
            reason=f"{len(found)} tensors are in bfloat16, {found[0]} among them",
            hint="cast to float16 (`tidy.cast`), or emit pt2, openvino or executorch",
            where=found[0],
        )


def save_model(model: Any, stage: Path, name: str) -> tuple[str, ...]:
    """Write the model, large weights beside it; return the names of its files."""
    import onnx_ir

    total = sum(v.const_value.nbytes for v in model.graph.initializers.values())
    if total <= _INLINE_BYTES:
        onnx_ir.save(model, stage / name)
        return (name,)
    data = f"{name}.data"
    onnx_ir.save(model, stage / name, external_data=data)
    return name, data


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
                custom_translation_table=dict(translations(program, opset)),
                verbose=False,
            )
        except Exception as error:
            raise EmitError(
                "torch.onnx cannot translate the program",
                reason=_reason(error),
                hint="emit it as `pt2`, or try another opset",
            ) from error
    assert made is not None, "the exporter returns the model unless given a path"
    release_indices(made.model)
    simplify(made.model)
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
