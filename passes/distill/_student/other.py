"""Another model as the student: built, captured on the same inputs, and put in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxcompress.errors import CaptureError, FxCompressError, ModelError, UsageError
from fxcompress.ir._document import graph_to_json, program_from_json, stored_tensors
from fxcompress.ir._format import Spelling
from fxcompress.ir.capture import capture
from fxcompress.pipeline._close import did_you_mean
from fxcompress.pipeline._probes import probes
from fxcompress.rewrite.graft import graft
from passes.distill.student import StudentDecision

if TYPE_CHECKING:
    from pydantic import BaseModel

    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["other_model", "put_in_place"]


def other_model(program: Program, block: BaseModel, context: Context) -> StudentDecision:
    """Return another model as a decision: its graph as a document, its tensors as arrays.

    Raises:
        ModelError: It cannot be built, or does not run on the inputs.
        CaptureError: It cannot be recorded.
        UsageError: Its inputs or outputs are not those of the Program.
    """
    other = _built(program, block, context)
    _check_inputs(program, other)
    _check_outputs(program, other)
    name = next(str(value) for value in block.model_dump(exclude_none=True).values())
    return StudentDecision(
        document=graph_to_json(other),
        source=f"{name} in the place of {program.name}",
        arrays={f"tensor/{key}": tensor for key, tensor in stored_tensors(other).items()},
    )


def put_in_place(rewriter: GraphRewriter, decision: StudentDecision) -> None:
    """Replace the whole graph by the other model's."""
    assert decision.document is not None, "the decision is one of another model"
    tensors = {
        name.removeprefix("tensor/"): torch.as_tensor(value)
        for name, value in decision.arrays.items()
    }
    graft(rewriter, program_from_json(decision.document, tensors))


def _built(program: Program, block: BaseModel, context: Context) -> Program:
    from fxcompress.spec import Spec
    from fxcompress.spec.load_model import build_model

    raw = block.model_dump(mode="json", exclude_none=True, by_alias=True)
    meta = any(tensor.is_meta for tensor in program.state().values())
    spec = Spec.parse(
        {"fxcompress": 1, "model": raw, "seed": context.seed}, folder=context.folder, name="model"
    )
    model = build_model(spec, meta=meta)
    if not isinstance(model, nn.Module):
        return model
    args, kwargs = _call(program)
    dynamic = {
        tensor.name: {place: s for place, s in enumerate(tensor.shape) if isinstance(s, str)}
        for tensor in program.signature.inputs
    }
    try:
        return capture(
            model,
            args,
            kwargs,
            dynamic={name: dims for name, dims in dynamic.items() if dims} or None,
            name=program.name,
        )
    except CaptureError:
        raise
    except (FxCompressError, TypeError) as error:
        takes = ", ".join(tensor.name for tensor in program.signature.inputs)
        raise ModelError(
            "the student does not take the inputs of the model",
            reason=str(error).splitlines()[0],
            hint=f"its `forward` must take {takes}, as the model's does",
        ) from error


def _call(program: Program) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments for the original's call, with values that are in range."""
    signature = program.signature
    leaves = next(iter(probes(program, 0)))
    named = dict(zip((tensor.name for tensor in signature.inputs), leaves, strict=True))
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    positional = True
    for parameter in signature.parameters:
        given = any(name is not None for name in parameter.leaves)
        values = [
            constant if name is None else named[name]
            for name, constant in zip(parameter.leaves, parameter.constants, strict=True)
        ]
        value = pytree.tree_unflatten(values, parameter.tree)
        positional = positional and given and parameter.kind != "KEYWORD_ONLY"
        if parameter.kind == "VAR_POSITIONAL":
            args.extend(value)
        elif parameter.kind == "VAR_KEYWORD":
            kwargs.update(value)
        elif positional:
            args.append(value)
        elif given or not parameter.tree.is_leaf() or parameter.constants[0] is not None:
            kwargs[parameter.name] = value
    return tuple(args), kwargs


def _check_inputs(program: Program, other: Program) -> None:
    mine = {tensor.name: tensor for tensor in program.signature.inputs}
    its = {tensor.name: tensor for tensor in other.signature.inputs}
    for name in mine.keys() - its.keys():
        _disagree(f"it takes no input {name}", did_you_mean(name, its, kind="it takes"))
    for name in its.keys() - mine.keys():
        _disagree(f"it needs an input {name}", did_you_mean(name, mine, kind="the model has"))
    for name, tensor in mine.items():
        if (tensor.dtype, tensor.shape) != (its[name].dtype, its[name].shape):
            _disagree(
                f"its input {name} is {its[name].dtype}{list(its[name].shape)}, the model's "
                f"{tensor.dtype}{list(tensor.shape)}"
            )


def _check_outputs(program: Program, other: Program) -> None:
    if program.signature.output != other.signature.output:
        _disagree(f"it returns {other.signature.output}, the model {program.signature.output}")
    pairs = zip(_outputs(program), _outputs(other), strict=True)
    for place, (mine, its) in enumerate(pairs):
        if mine != its:
            _disagree(
                f"its output {place} is {its}, the model's {mine}",
                "classes and vocabulary must be those of the model",
            )


def _outputs(program: Program) -> list[str]:
    (output,) = program.graph.find_nodes(op="output")
    spelling = Spelling.of(program)
    return [spelling.type(getattr(node, "meta", {}).get("val")) for node in output.args[0]]


def _disagree(reason: str, hint: str = "") -> NoReturn:
    raise UsageError(
        "the student cannot take the model's place",
        reason=reason,
        hint=hint or "build it for the same inputs and outputs",
    )
