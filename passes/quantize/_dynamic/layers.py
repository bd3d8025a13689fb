"""Which layers are quantised, what they multiply, and why the others are not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor, fx

from fxcompress.errors import UsageError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import bind, module_of, op_name
from fxcompress.nn import take_weight_as_operand, take_weights_as_operands
from fxcompress.pipeline.selectors import Selector
from fxcompress.rewrite.edits import Declined
from passes.quantize._experts import experts_in_float
from passes.quantize._masked import unmasked
from passes.quantize._rules import CONVOLUTIONS, LAYERS

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from passes.quantize.dynamic import DynamicOptions

__all__ = ["Layers", "activation_of", "choose", "is_recurrent", "matrix_names", "weight_operand"]

_RECURRENT: Final = frozenset({"lstm", "gru", "rnn"})
_CELLS: Final = frozenset({"lstm_cell", "gru_cell", "rnn_cell"})
_INPUT: Final = {"addmm": "mat1"}
_WEIGHT: Final = {"addmm": "mat2"}


@dataclass(frozen=True)
class Layers:
    """The layers to quantise in graph order, refusals, and the ids of nodes."""

    chosen: tuple[fx.Node, ...]
    declined: tuple[Declined, ...]
    ids: Mapping[fx.Node, str]


def is_recurrent(node: fx.Node) -> bool:
    """Whether a node calls an LSTM, a GRU or an RNN."""
    return op_name(node) in _RECURRENT


def activation_of(node: fx.Node) -> fx.Node:
    """Return what a layer multiplies its weight with."""
    found = bind(node)[_INPUT.get(op_name(node), "input")]
    assert isinstance(found, fx.Node), "a layer's input is a tensor"
    return found


def weight_operand(node: fx.Node) -> fx.Node | None:
    """Return the node that a layer takes its weight from; None where it has its own."""
    found = bind(node).get(_WEIGHT.get(op_name(node), "weight"))
    return found if isinstance(found, fx.Node) else None


def matrix_names(node: fx.Node) -> list[str]:
    """Return the names of a recurrent layer's matrices, in the order of its operands."""
    return [name for name, _ in module_of(node).named_parameters() if name.startswith("weight_")]


def choose(program: Program, options: DynamicOptions) -> Layers:
    """Select layers, and decline those that cannot be quantised.

    Raises:
        SelectorError: The selection fits no layer, or not as many as expected.
    """
    ids = node_ids(program)
    candidates = [node for node in program.nodes if _is_candidate(node)]
    selected = set(Selector.of(options).select(program, candidates))
    chosen: list[fx.Node] = []
    declined: list[Declined] = []
    for node in candidates:
        reason, because = "it is not selected", tuple[fx.Node, ...]()
        if node in selected:
            reason, because = _obstacle(node)
        if reason:
            names = tuple(ids[each] for each in because)
            declined.append(Declined(node=ids[node], reason=reason, because_of=names))
        else:
            chosen.append(node)
    whole = _whole_modules(chosen, ids, declined)
    declined += experts_in_float(program, ids)
    return Layers(whole, tuple(declined), ids)


def _is_candidate(node: fx.Node) -> bool:
    op = op_name(node)
    if op == "addmm":
        source = weight_operand(node)
        return source is not None and op_name(unmasked(source)) in ("param", "fake_quant")
    return op in LAYERS or op in _CELLS or (op in _RECURRENT and node.op == "call_module")


def _obstacle(node: fx.Node) -> tuple[str, tuple[fx.Node, ...]]:
    """Return why a layer cannot be quantised, or nothing."""
    op = op_name(node)
    if op in _CELLS:
        return "a single cell has no quantised form; a layer over the sequence has", ()
    if op in _RECURRENT:
        return _recurrent_obstacle(node)
    source = weight_operand(node)
    weight: Any
    if source is None:
        try:
            take_weight_as_operand(module_of(node))
        except UsageError as error:
            return error.what, ()
        weight = module_of(node).weight
    elif op_name(source) == "fake_quant":
        return "it is quantised already", (source,)
    elif op_name(unmasked(source)) != "param":
        return "its weight is computed in the graph", (source,)
    else:
        weight = source.meta.get("val")
    if not (isinstance(weight, Tensor) and weight.is_floating_point()):
        return "its weight is not floating point", ()
    norm = next(iter(node.users), None)
    if op in CONVOLUTIONS and norm is not None and op_name(norm) == "batch_norm":
        if len(node.users) == 1:
            return "a batch norm follows it: run tidy.fold_batchnorm first", (norm,)
    return "", ()


def _recurrent_obstacle(node: fx.Node) -> tuple[str, tuple[fx.Node, ...]]:
    operands = bind(node).get("weights") or ()
    if operands:
        return "it is quantised already", tuple(operands)
    value = activation_of(node).meta.get("val")
    if not isinstance(value, Tensor):
        return "its input is a packed sequence", ()
    try:
        take_weights_as_operands(module_of(node))
    except UsageError as error:
        return error.what, ()
    if not value.is_floating_point():
        return "its weight is not floating point", ()
    return "", ()


def _whole_modules(
    chosen: list[fx.Node], ids: Mapping[fx.Node, str], declined: list[Declined]
) -> tuple[fx.Node, ...]:
    """Drop calls of a module whose other calls stay in float: they share its form."""
    kept: list[fx.Node] = []
    for node in chosen:
        others: list[fx.Node] = []
        if node.op == "call_module":
            calls = node.graph.find_nodes(op="call_module", target=node.target)
            others = [each for each in calls if each not in chosen]
        if others:
            reason = "its module is called again where it stays in float"
            names = tuple(sorted(ids[each] for each in others))
            declined.append(Declined(node=ids[node], reason=reason, because_of=names))
        else:
            kept.append(node)
    return tuple(kept)
