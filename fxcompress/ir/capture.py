"""Capture a model as a Program: one canonical FX graph with its original names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from fxcompress.errors import CaptureError, ModelError
from fxcompress.ir._calling import CallLike
from fxcompress.ir._recorder._build import build_module
from fxcompress.ir._recorder._inputs import BoundCall, DynamicDims, bind_call
from fxcompress.ir._recorder._loops import loops_written_out
from fxcompress.ir._recorder._modes import DualRecording, record_both, record_exported
from fxcompress.ir._recorder._notes import (
    changed_state,
    check_opaque,
    fixed_sizes,
    kept_opaque,
    stochastic_calls,
    unused_state,
)
from fxcompress.ir._recorder._sizes import Sizes
from fxcompress.ir._recorder._state import ModelState
from fxcompress.ir._recorder._verified import check_against_export, verified
from fxcompress.ir.program import Note, Program
from fxcompress.ir.signature import Signature

__all__ = ["capture"]


def capture(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: DynamicDims = "batch",
    opaque: Sequence[str] = (),
    static: Sequence[str] = (),
    name: str | None = None,
    verify: bool = True,
    tracer: Literal["recorder", "export"] = "recorder",
    check: Literal["export"] | None = None,
) -> Program:
    """Record `model` on example inputs and return it as a Program.

    The model is left as it was: it runs as a copy of its Python state, on tensors without data.

    Args:
        model: The model; on the meta device nothing is allocated.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        dynamic: Sizes that may vary, `{"x": {0: "batch"}}` by input and dimension; one name is one
            size. `"batch"` means the first dimension of every tensor input; None means none.
        opaque: Globs of qualified module names that stay one untouched call each.
        static: Names in `dynamic` that are fixed to the example's size after all.
        name: The Program's name; the model's class where it is None.
        verify: Whether to compare the Program with the model on a second random input.
        tracer: `export` captures through `torch.export`, where the recorder cannot; the graph is
            then that of evaluation mode.
        check: `export` asks `torch.export` for a second opinion on the Program's outputs.

    Raises:
        CaptureError: The model cannot be recorded faithfully; the error names its line.
        ModelError: The example inputs do not fit the model.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"capture takes a torch.nn.Module, not a {type(model).__name__}",
            hint="wrap a function in a module whose forward calls it",
        )
    check_opaque(model, tuple(opaque))
    call = bind_call(model, args, kwargs or {}, dynamic, static)
    state = ModelState.of(model)
    dual = _recorded(model, state, call, tuple(opaque), tracer)
    title = name or type(model).__name__
    program = _program(model, dual, call, state, title)
    if verify:
        program = verified(program, model, call, dual)
    if check == "export":
        check_against_export(program, model, call, dual)
    return program


def _recorded(
    model: nn.Module, state: ModelState, call: BoundCall, opaque: tuple[str, ...], tracer: str
) -> DualRecording:
    """Record as the model is, or with its loops over experts written out where that fails."""

    def record() -> DualRecording:
        sizes = _make_sizes(call)
        found = (t.device for t in call.examples if t.device.type != "meta")
        stand_ins = state.fakes(sizes.fake_mode, next(found, torch.device("cpu")))
        if tracer == "export":
            return record_exported(model, state, call, sizes, stand_ins)
        return record_both(model, state, call, sizes, stand_ins, opaque)

    try:
        return record()
    except CaptureError:
        with loops_written_out(model) as loops:
            if not loops:
                raise
            dual = record()
        dual.notes += [Note("experts", path, text) for path, text in loops.items()]
        return dual


def _program(
    model: nn.Module, dual: DualRecording, call: BoundCall, state: ModelState, title: str
) -> Program:
    recording = dual.recording
    signature = Signature(call.parameters, call.inputs, recording.output)
    recording.graph.set_codegen(CallLike(signature))
    module = build_module(
        model, recording.graph, recording.leaves, state, recording.constants, title
    )
    if dual.evaluates_only:
        module.eval()
    held = set(dict(module.named_parameters(remove_duplicate=False)))
    held |= set(dict(module.named_buffers(remove_duplicate=False)))
    ties = {alias: first for alias, first in state.ties.items() if alias in held}
    notes = (
        *fixed_sizes(call),
        *dual.notes,
        *unused_state(state, module, model),
        *changed_state(recording.mutated, recording.leaves),
        *kept_opaque(recording.opaque, model),
        *stochastic_calls(recording.graph),
    )
    sizes = recording.sizes
    return Program(module, title, signature, sizes.dims, sizes.fake_mode, ties, notes)


def _make_sizes(call: BoundCall) -> Sizes:
    """Return the symbols for the dynamic sizes of a call."""
    names = {s for t in call.inputs for s in t.shape if isinstance(s, str)}
    fixed = frozenset(s for t in call.inputs for s in t.shape if isinstance(s, int))
    return Sizes.create({name: call.examples_of(name) for name in sorted(names)}, fixed)
