"""One graph for both modes: what differs between evaluation and training follows `.training`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch.nn.functional as F
from torch import fx, nn

from fxcompress.ir._recorder._clean import remove_dead
from fxcompress.nn.stochastic import TrainingSwitch

__all__ = ["Difference", "drop_inactive", "merge_modes"]

_DROPOUTS: Final[dict[Any, Callable[[float], nn.Module]]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}
_DROPOUT_MODULES: Final = (nn.modules.dropout._DropoutNd,)


class Difference(Exception):
    """The two recordings are of different structure; the message says where."""


@dataclass
class _Merger:
    model: nn.Module
    leaves: dict[str, nn.Module]
    pairs: dict[fx.Node, fx.Node] = field(default_factory=dict)
    literals: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)


def merge_modes(
    evaluated: fx.Graph, trained: fx.Graph, leaves: dict[str, nn.Module], model: nn.Module
) -> None:
    """Change the evaluation graph so that it is right in both modes.

    Functional dropout becomes a `Dropout` module in the scope that calls it; any other number that
    differs becomes a `TrainingSwitch`. New modules are added to `leaves`.

    Raises:
        Difference: The graphs differ in more than numbers; nothing was changed.
    """
    merger = _Merger(model, leaves)
    left = [n for n in evaluated.nodes if n.op != "get_attr"]
    right = [n for n in trained.nodes if n.op != "get_attr"]
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        _pair(merger, one, other)
        if index + 1 == min(len(left), len(right)) and len(left) != len(right):
            raise Difference(f"{len(left)} calls in evaluation, {len(right)} in training")
    for one, other in merger.literals:
        _reconcile(merger, one, other)


def _pair(merger: _Merger, one: fx.Node, other: fx.Node) -> None:
    if one.op != other.op or one.target != other.target:
        place = other.meta.get("source") or one.meta.get("source") or "the model"
        raise Difference(f"{place}: {_show(one)} in evaluation, {_show(other)} in training")
    same = _same(merger, one.args, other.args) and _same(merger, one.kwargs, other.kwargs)
    if not same:
        if not _same_nodes(merger, one, other):
            place = one.meta.get("source") or "the model"
            raise Difference(f"{place}: {_show(one)} has other operands in training")
        merger.literals.append((one, other))
    merger.pairs[one] = other


def _show(node: fx.Node) -> str:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "?")
    return str(name)


def _same(merger: _Merger, one: Any, other: Any) -> bool:
    if isinstance(one, fx.Node) or isinstance(other, fx.Node):
        return _is_pair(merger, one, other)
    if isinstance(one, (tuple, list)):
        return (
            isinstance(other, (tuple, list))
            and len(one) == len(other)
            and all(_same(merger, a, b) for a, b in zip(one, other, strict=True))
        )
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and one.keys() == other.keys()
            and all(_same(merger, one[key], other[key]) for key in one)
        )
    if isinstance(one, slice):
        return isinstance(other, slice) and all(
            _same(merger, getattr(one, part), getattr(other, part))
            for part in ("start", "stop", "step")
        )
    return type(one) is type(other) and bool(one == other)


def _is_pair(merger: _Merger, one: Any, other: Any) -> bool:
    if not isinstance(one, fx.Node) or not isinstance(other, fx.Node):
        return False
    if one.op == "get_attr":
        return other.op == "get_attr" and one.target == other.target
    return merger.pairs.get(one) is other


def _same_nodes(merger: _Merger, one: fx.Node, other: fx.Node) -> bool:
    left, right = one.all_input_nodes, other.all_input_nodes
    return len(left) == len(right) and all(
        _is_pair(merger, a, b) for a, b in zip(left, right, strict=True)
    )


def _reconcile(merger: _Merger, one: fx.Node, other: fx.Node) -> None:
    make = _DROPOUTS.get(one.target) if one.op == "call_function" else None
    if make is not None:
        _as_dropout(merger, one, other, make)
        return
    args = tuple(_switched(merger, one, a, b) for a, b in zip(one.args, other.args, strict=True))
    kwargs = {key: _switched(merger, one, one.kwargs[key], other.kwargs[key]) for key in one.kwargs}
    one.args, one.kwargs = args, kwargs


def _as_dropout(
    merger: _Merger, one: fx.Node, other: fx.Node, make: Callable[[float], nn.Module]
) -> None:
    probability = other.kwargs.get("p", 0.5) if other.kwargs.get("training", True) else 0.0
    path = _free_path(merger, one, "dropout")
    merger.leaves[path] = make(probability)  # type: ignore[arg-type]
    _replace(one, path, (one.args[0],))


def _replace(node: fx.Node, path: str, args: tuple[Any, ...]) -> None:
    with node.graph.inserting_before(node):
        call = node.graph.call_module(path, args)
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    node.graph.erase_node(node)


def _free_path(merger: _Merger, node: fx.Node, name: str) -> str:
    prefix = f"{node.meta['scope'][-1][0]}." if node.meta.get("scope") else ""
    scope = merger.model.get_submodule(prefix[:-1]) if prefix else merger.model
    count, candidate = 0, name
    while hasattr(scope, candidate) or f"{prefix}{candidate}" in merger.leaves:
        count += 1
        candidate = f"{name}_{count}"
    return f"{prefix}{candidate}"


def _switched(merger: _Merger, node: fx.Node, one: Any, other: Any) -> Any:
    if isinstance(one, fx.Node) or _same(merger, one, other):
        return one
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return type(one)(_switched(merger, node, a, b) for a, b in zip(one, other, strict=True))
    if not isinstance(one, (bool, int, float)) or not isinstance(other, (bool, int, float)):
        raise Difference(f"{_show(node)} takes {one!r} in evaluation and {other!r} in training")
    path = _free_path(merger, node, "training_switch")
    merger.leaves[path] = TrainingSwitch(other, one)
    with node.graph.inserting_before(node):
        switch = node.graph.call_module(path, ())
    switch.meta.update(val=one, scope=node.meta.get("scope", ()), source=node.meta.get("source"))
    return switch


def drop_inactive(graph: fx.Graph, leaves: dict[str, nn.Module]) -> None:
    """Remove dropout that never drops: of probability 0, or never in training mode."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _DROPOUTS:
            off = node.kwargs.get("training", True) is False or node.kwargs.get("p", 0.5) == 0.0
        elif node.op == "call_module" and isinstance(
            leaves.get(str(node.target)), _DROPOUT_MODULES
        ):
            off = leaves[str(node.target)].p == 0.0
        else:
            continue
        if off:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    remove_dead(graph)
