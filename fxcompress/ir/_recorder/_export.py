"""The other tracer: `torch.export`, its ATen calls recorded again under the original modules."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from fxcompress.errors import CaptureError
from fxcompress.ir._recorder._inputs import BoundCall
from fxcompress.ir._recorder._mode import Recorder
from fxcompress.ir._recorder._overloads import call_overload
from fxcompress.ir._recorder._play import scope_of
from fxcompress.ir._recorder._probe import probe_inputs
from fxcompress.ir._recorder._scopes import is_leaf
from fxcompress.ir._recorder._sizes import Sizes
from fxcompress.ir._recorder._state import ModelState

__all__ = ["Player", "export_model", "fold_stateless_modules"]


def export_model(model: nn.Module, call: BoundCall, sizes: Sizes) -> torch.export.ExportedProgram:
    """Return `torch.export`'s program of a model in evaluation mode.

    Raises:
        CaptureError: It cannot be exported.
    """
    chosen = {name: symbol.node.hint for name, symbol in sizes.symbols.items()}
    leaves = probe_inputs(call, chosen, masked=False)
    args, kwargs = call.rebuild(leaves)
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(
                model, args, kwargs, dynamic_shapes=_dynamic_shapes(call), strict=False
            )
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CaptureError(
            f"torch.export cannot capture {type(model).__name__}: {type(error).__name__}",
            reason=lines[0],
            hint='mark the module it names as opaque and use tracer="recorder"',
        ) from error
    finally:
        for module, flag in training.items():
            module.training = flag


def _dynamic_shapes(call: BoundCall) -> dict[str, Any]:
    by_name = {
        tensor.name: {
            place: torch.export.Dim.DYNAMIC
            for place, size in enumerate(tensor.shape)
            if isinstance(size, str)
        }
        for tensor in call.inputs
    }
    return {
        parameter.name: pytree.tree_unflatten(
            [None if name is None else by_name[name] or None for name in parameter.leaves],
            parameter.tree,
        )
        for parameter in call.parameters
        if parameter.name in call.given
    }


class Player:
    """Makes the calls of an exported program, each in the scope of the module that made it.

    Args:
        exported: The program.
        state: The original model's tensors by name.
        stand_ins: `id(real tensor)` -> fake tensor.
    """

    def __init__(
        self,
        exported: torch.export.ExportedProgram,
        state: ModelState,
        stand_ins: Mapping[int, Any],
    ) -> None:
        self._exported, self._state, self._stand_ins = exported, state, stand_ins

    def __call__(self, recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the calls on fake inputs and return the output in the original's structure."""
        env = self._inputs(args, kwargs)
        for node in self._exported.graph.nodes:
            if node.op == "call_function":
                recorder.scope = scope_of(node)
                operands = fx.map_arg(node.args, lambda n: env[n])
                named = fx.map_arg(dict(node.kwargs), lambda n: env[n])
                target: Any = node.target
                if isinstance(target, torch._ops.OpOverload):
                    env[node] = call_overload(target, operands, named)
                else:
                    env[node] = target(*operands, **named)
        recorder.scope = ()
        (results,) = self._exported.graph.output_node().args
        specs = self._exported.graph_signature.output_specs
        outputs = [
            env[value] if isinstance(value, fx.Node) else value
            for value, spec in zip(results, specs, strict=True)
            if spec.kind is OutputKind.USER_OUTPUT
        ]
        return pytree.tree_unflatten(outputs, self._exported.call_spec.out_spec)

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[fx.Node, Any]:
        given = iter(pytree.tree_leaves((args, kwargs)))
        holders = self._exported.graph.find_nodes(op="placeholder")
        env: dict[fx.Node, Any] = {}
        for node, spec in zip(holders, self._exported.graph_signature.input_specs, strict=True):
            if spec.kind is InputKind.USER_INPUT:
                env[node] = next(given)
            elif str(spec.target) in self._state.tensors or str(spec.target) in self._state.ties:
                name = self._state.ties.get(str(spec.target), str(spec.target))
                env[node] = self._stand_ins[id(self._state.tensors[name])]
            else:
                env[node] = self._exported.constants[str(spec.target)]
        return env


def fold_stateless_modules(graph: fx.Graph, leaves: dict[str, nn.Module], model: nn.Module) -> None:
    """Replace the one call that a stock module without tensors made by a call of that module."""
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        scope = node.meta.get("scope")
        if node.op in ("call_function", "call_method") and scope:
            calls.setdefault(scope[-1][0], []).append(node)
    for path, nodes in calls.items():
        module = model.get_submodule(path)
        if len(nodes) != 1 or path in leaves or not is_leaf(module):
            continue
        node = nodes[0]
        own = [*module.parameters(), *module.buffers()]
        if own or len(node.all_input_nodes) != 1 or node.target is operator.getitem:
            continue
        leaves[path] = module
        with graph.inserting_before(node):
            call = graph.call_module(path, (node.all_input_nodes[0],))
        call.meta = {**node.meta, "scope": node.meta["scope"][:-1]}
        node.replace_all_uses_with(call)
        graph.erase_node(node)
