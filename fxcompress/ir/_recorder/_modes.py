"""Record evaluation and training, and bring both into one canonical graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fxcompress.errors import CaptureError
from fxcompress.ir._recorder._clean import clean, remove_dead
from fxcompress.ir._recorder._export import Player, export_model, fold_stateless_modules
from fxcompress.ir._recorder._fake import Transcript
from fxcompress.ir._recorder._gradients import settle_gradients
from fxcompress.ir._recorder._guards import assumptions
from fxcompress.ir._recorder._inputs import BoundCall
from fxcompress.ir._recorder._merge import Difference, drop_inactive, merge_modes
from fxcompress.ir._recorder._play import plays
from fxcompress.ir._recorder._record import Recording, fake_inputs, record_model
from fxcompress.ir._recorder._sizes import Sizes
from fxcompress.ir._recorder._state import ModelState
from fxcompress.ir._recorder._stochastic import find_stochastic_leaves
from fxcompress.ir._recorder._stock import fold_stock_modules
from fxcompress.ir.program import Note

__all__ = ["DualRecording", "record_both", "record_exported"]


@dataclass
class DualRecording:
    """The evaluation recording, changed to be right in training too, and what to note.

    Attributes:
        recording: What was recorded.
        trains: Whether the graph is that of training mode too.
        notes: What a reader of the Program must know.
        evaluates_only: Whether the source was a graph of evaluation mode, without a training mode.
    """

    recording: Recording
    trains: bool
    notes: list[Note] = field(default_factory=list)
    evaluates_only: bool = False


def record_both(
    model: nn.Module,
    state: ModelState,
    call: BoundCall,
    sizes: Sizes,
    stand_ins: Mapping[int, Any],
    opaque: tuple[str, ...],
) -> DualRecording:
    """Record `model` in both modes and merge the two.

    Raises:
        CaptureError: It cannot be recorded in evaluation mode.
    """
    stochastic = find_stochastic_leaves(model)
    transcript = Transcript()
    fakes = fake_inputs(call, sizes)

    def one(training: bool) -> Recording:
        recording = record_model(
            model, state, call, sizes, dict(stand_ins), transcript, fakes, training=training,
            opaque=opaque, stochastic=stochastic,
        )  # fmt: skip
        graph, leaves = recording.graph, recording.leaves
        remove_dead(graph)
        trainable = {path for path, leaf in leaves.items() if _trains(path, leaf, state)}
        settle_gradients(graph, state, trainable)
        fold_stock_modules(graph, leaves, model, state, training=training)
        clean(graph)
        return recording

    evaluated = one(False)
    dual = DualRecording(evaluated, trains=True)
    try:
        transcript.rewind()
        with sizes.env.settling():
            trained = one(True)
        leaves = {**trained.leaves, **evaluated.leaves}
        merge_modes(evaluated.graph, trained.graph, leaves, model)
        evaluated.leaves = leaves
    except (CaptureError, Difference) as error:
        dual.trains = False
        dual.evaluates_only = plays(model)
        where = error.where or "" if isinstance(error, CaptureError) else ""
        text = f"the graph is that of evaluation mode; in training mode: {error}"
        dual.notes.append(Note("train-differs", where, text))
    drop_inactive(evaluated.graph, evaluated.leaves)
    dual.notes.extend(assumptions(sizes, evaluated.guards))
    return dual


def record_exported(
    model: nn.Module,
    state: ModelState,
    call: BoundCall,
    sizes: Sizes,
    stand_ins: Mapping[int, Any],
) -> DualRecording:
    """Record what `torch.export` makes of `model`: evaluation mode only.

    Raises:
        CaptureError: It cannot be exported, or its calls cannot be recorded.
    """
    exported = export_model(model, call, sizes)
    recording = record_model(
        model, state, call, sizes, dict(stand_ins), Transcript(), fake_inputs(call, sizes),
        training=False, player=Player(exported, state, stand_ins),
    )  # fmt: skip
    graph, leaves = recording.graph, recording.leaves
    remove_dead(graph)
    settle_gradients(graph, state, set())
    fold_stock_modules(graph, leaves, model, state, training=False)
    fold_stateless_modules(graph, leaves, model)
    clean(graph)
    drop_inactive(graph, leaves)
    notes = [
        Note("tracer", type(model).__name__, "captured through torch.export"),
        Note("train-differs", "", "torch.export gives the graph of evaluation mode only"),
        *assumptions(sizes, recording.guards),
    ]
    return DualRecording(recording, trains=False, notes=notes, evaluates_only=True)


def _trains(path: str, leaf: nn.Module, state: ModelState) -> bool:
    for name, _ in leaf.named_parameters():
        full = f"{path}.{name}"
        tensor = state.tensors.get(state.ties.get(full, full))
        if tensor is not None and tensor.requires_grad:
            return True
    return False
