"""Which convolutions and linear layers are quantised, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxcompress.errors import UsageError
from fxcompress.ir.ops import bind, module_of, op_name
from fxcompress.nn import take_weight_as_operand
from fxcompress.pipeline.selectors import Selector
from fxcompress.rewrite.edits import Declined
from passes._layers.quantizer import QUANTIZERS
from passes.quantize._experts import experts_in_float
from passes.quantize._masked import unmasked
from passes.quantize._overrides import Formats, read_overrides
from passes.quantize._rules import CONVOLUTIONS, LAYERS

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from passes.quantize._options import StaticOptions

__all__ = ["Layers", "choose_layers", "ends"]


@dataclass(frozen=True)
class Layers:
    """The layers to quantise, the nodes to leave alone, what is said of some, and refusals."""

    chosen: tuple[fx.Node, ...]
    excluded: frozenset[fx.Node]
    declined: tuple[Declined, ...]
    formats: Formats


def choose_layers(
    program: Program,
    options: StaticOptions,
    ids: Mapping[fx.Node, str],
    norms: Mapping[fx.Node, fx.Node] | None = None,
) -> Layers:
    """Select layers, and decline those that cannot be quantised or are asked to be kept.

    `norms` says which batch norms are folded while training, by the layer before them.

    Raises:
        SelectorError: The selection fits no layer, or not as many as expected.
    """
    rules = options.rules
    candidates = [node for node in program.nodes if op_name(node) in LAYERS]
    followers = [n for n in program.nodes if op_name(n) in rules.combines | rules.averages]
    formats = read_overrides(program, options, candidates, followers)
    selector = Selector(options.targets, options.types, options.exclude, options.expect)
    selected = set(selector.select(program, candidates))
    kept = {
        **(ends(program, candidates, first=True) if options.keep_first else {}),
        **(ends(program, candidates, first=False) if options.keep_last else {}),
    }
    chosen, declined = [], []
    for node in candidates:
        because: tuple[fx.Node, ...] = ()
        reason: str | None = "it is not selected"
        if node in selected:
            reason = kept.get(node) or formats.kept.get(node)
            if reason is None and op_name(node) not in rules.layers:
                reason = f"{rules.name} has no integer kernel of {op_name(node)}"
            if reason is None:
                reason, because = _obstacle(node, folded=node in (norms or {}))
        if reason is None:
            chosen.append(node)
        else:
            names = tuple(ids[each] for each in because)
            declined.append(Declined(node=ids[node], reason=reason, because_of=names))
    excluded = {node for node in followers if node in formats.kept}
    excluded.update(Selector(options.keep).select(program, followers) if options.keep else ())
    whole = _whole_modules(chosen, ids, declined)
    declined += experts_in_float(program, ids)
    return Layers(whole, frozenset(excluded), tuple(declined), formats)


def _obstacle(node: fx.Node, *, folded: bool) -> tuple[str | None, tuple[fx.Node, ...]]:
    """Return why a layer cannot be quantised, or None."""
    if len(node.args) > 1 and node.op == "call_module":
        operand = node.args[1]
        if isinstance(operand, fx.Node) and op_name(operand) in QUANTIZERS:
            return "it is quantised already", (operand,)
        if not (isinstance(operand, fx.Node) and op_name(operand) == "mask"):
            return "it takes more than its input as an operand", ()
        weight: Any = operand.meta.get("val")
    elif node.op == "call_module":
        try:
            take_weight_as_operand(module_of(node))
        except UsageError as error:
            return error.what, ()
        weight = module_of(node).weight
    else:
        operand = bind(node).get("weight")
        if not isinstance(operand, fx.Node) or op_name(operand) in QUANTIZERS:
            return "it is quantised already", ()
        if unmasked(operand).op != "get_attr":
            return "its weight is computed in the graph", (operand,)
        weight = operand.meta.get("val")
    if not (isinstance(weight, torch.Tensor) and weight.is_floating_point()):
        return "its weight is not floating point", ()
    norm = next(iter(node.users), None)
    if not folded and norm is not None and len(node.users) == 1 and op_name(norm) == "batch_norm":
        if op_name(node) in CONVOLUTIONS:
            return "a batch norm follows it: run tidy.fold_batchnorm first", (norm,)
    return None, ()


def _whole_modules(
    chosen: list[fx.Node], ids: Mapping[fx.Node, str], declined: list[Declined]
) -> tuple[fx.Node, ...]:
    """Drop calls of a module whose other calls are not quantised: they share the weight."""
    calls: dict[str, list[fx.Node]] = {}
    for node in chosen:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    dropped = set()
    for path, nodes in calls.items():
        others = set(nodes[0].graph.find_nodes(op="call_module", target=path)) - set(nodes)
        for node in nodes if others else ():
            dropped.add(node)
            declined.append(
                Declined(
                    node=ids[node],
                    reason="its module is called again where it stays in float",
                    because_of=tuple(sorted(ids[other] for other in others)),
                )
            )
    return tuple(node for node in chosen if node not in dropped)


def ends(program: Program, layers: Iterable[fx.Node], *, first: bool) -> dict[fx.Node, str]:
    """Return the layers with no other layer before (or after) them."""
    members = set(layers)
    found: dict[fx.Node, str] = {}
    reached: set[fx.Node] = set()
    for node in program.nodes if first else reversed(list(program.nodes)):
        neighbours = node.all_input_nodes if first else list(node.users)
        if any(each in reached or each in members for each in neighbours):
            reached.add(node)
        elif node in members:
            found[node] = f"keep_{'first' if first else 'last'} is set"
    return found
