"""Every capture is proved on a second input: other values, another batch size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import nn

from fxcompress.errors import CaptureError
from fxcompress.ir._copying import copy_module
from fxcompress.ir._recorder._check import check_evaluation, check_training, output_difference
from fxcompress.ir._recorder._export import export_model
from fxcompress.ir._recorder._inputs import BoundCall
from fxcompress.ir._recorder._modes import DualRecording
from fxcompress.ir._recorder._probe import other_sizes, probe_inputs
from fxcompress.ir.program import Note, Program

__all__ = ["check_against_export", "verified"]

# Above this many parameters a training step costs more than it tells at every capture.
_TRAINING_LIMIT: Final = 200_000_000


def verified(program: Program, model: nn.Module, call: BoundCall, dual: DualRecording) -> Program:
    """Return the Program, compared with its model; what could not be compared is noted.

    Raises:
        CaptureError: The two compute different things in evaluation mode.
    """
    if any(t.device.type == "meta" for t in (*model.parameters(), *call.examples)):
        text = "not compared with the model: its weights are on the meta device"
        return program.with_notes(Note("tracer", program.name, text))
    sizes = other_sizes(program.dims, dual.recording.guards)
    examples = {name: dim.example for name, dim in program.dims.items()}
    for chosen in (sizes, examples):
        for masked in (True, False):
            inputs = probe_inputs(call, chosen, masked=masked)
            if check_evaluation(program, model, call, inputs):
                return _trained(program, model, call, dual, inputs)
    check_evaluation(program, model, call, list(call.examples))
    return _trained(program, model, call, dual, list(call.examples))


def _trained(
    program: Program,
    model: nn.Module,
    call: BoundCall,
    dual: DualRecording,
    inputs: Sequence[torch.Tensor],
) -> Program:
    count = sum(p.numel() for p in model.parameters())
    if not dual.trains or count > _TRAINING_LIMIT:
        return program
    problem = check_training(program, model, call, inputs)
    if not problem:
        return program
    text = f"a seeded training step differs from the model's: {problem}"
    return program.with_notes(Note("train-differs", program.name, text))


def check_against_export(
    program: Program, model: nn.Module, call: BoundCall, dual: DualRecording
) -> None:
    """Compare a Program with what `torch.export` makes of its model.

    Raises:
        CaptureError: The model cannot be exported, or the two compute different things.
    """
    exported = export_model(model, call, dual.recording.sizes).module()
    chosen = {n: int(s.node.hint) for n, s in dual.recording.sizes.symbols.items()}
    inputs = probe_inputs(call, chosen, masked=True, seed=2)
    args, kwargs = call.rebuild(inputs)
    with torch.no_grad():
        expected = exported(*args, **kwargs)
        got = copy_module(program.module).eval()(*args, **kwargs)
    problem = output_difference(expected, got)
    if problem:
        raise CaptureError(
            f"the captured graph of {program.name} and torch.export's disagree: {problem}",
            reason="one of the two tracers took another course than the model",
            hint="compare both with the model on real inputs",
        )
