"""The other tracer: `torch.export`, its ATen calls recorded again under the original modules."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from fxcompress.errors import CaptureError
from fxcompress.ir._recorder._inputs import BoundCall
from fxcompress.ir._recorder._mode import Recorder
from fxcompress.ir._recorder._probe import probe_inputs
from fxcompress.ir._recorder._scopes import is_leaf
from fxcompress.ir._recorder._sizes import Sizes
from fxcompress.ir._recorder._state import ModelState
from fxcompress.ir.modules import qualified_class

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
        model: The original, for module paths.
        state: Its tensors by name.
        stand_ins: `id(real tensor)` -> fake tensor.
    """

    def __init__(
        self,
        exported: torch.export.ExportedProgram,
        model: nn.Module,
        state: ModelState,
        stand_ins: Mapping[int, Any],
    ) -> None:
        self._exported, self._state, self._stand_ins = exported, state, stand_ins
        self._classes = {path: qualified_class(type(m)) for path, m in model.named_modules()}

    def __call__(self, recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the calls on fake inputs and return the output in the original's structure."""
        env = self._inputs(args, kwargs)
        for node in self._exported.graph.nodes:
            if node.op == "call_function":
                recorder.scope = self._scope(node)
                operands = fx.map_arg(node.args, lambda n: env[n])
                named = fx.map_arg(dict(node.kwargs), lambda n: env[n])
                env[node] = _call(node.target, operands, named)
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

    def _scope(self, node: fx.Node) -> tuple[tuple[str, str], ...]:
        stack = node.meta.get("nn_module_stack") or {}
        paths = [path.split("@")[0] for path, _ in stack.values()]
        return tuple(
            (path, self._classes[path]) for path in paths if self._classes.get(path) and path
        )


def _call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not isinstance(target, torch._ops.OpOverload):
        return target(*args, **kwargs)
    bound = {
        argument.name: value
        for argument, value in zip(target._schema.arguments, args, strict=False)
    }
    special = _SPECIAL.get(target._schema.name)
    if special is not None:
        return special({**bound, **kwargs})
    name = target._schema.name.partition("::")[2]
    for space in (F, torch):
        function = getattr(space, name, None)
        if target.namespace == "aten" and callable(function):
            return function(*args, **kwargs)
    method = getattr(torch.Tensor, name, None)
    if target.namespace == "aten" and callable(method):
        return method(*args, **kwargs)
    return target(*args, **kwargs)


def _take(function: Callable[..., Any], *names: str, **renamed: str) -> Callable[..., Any]:
    """Call `function` with some of an overload's arguments, by name; `new=old` renames one."""

    def call(bound: dict[str, Any]) -> Any:
        chosen = {name: bound[name] for name in names if name in bound}
        chosen.update({new: bound[old] for new, old in renamed.items() if old in bound})
        return function(**chosen)

    return call


_NORM: Final = (
    "input",
    "running_mean",
    "running_var",
    "weight",
    "bias",
    "training",
    "momentum",
    "eps",
)
_SPECIAL: Final[dict[str, Callable[[dict[str, Any]], Any]]] = {
    "aten::batch_norm": _take(F.batch_norm, *_NORM),
    "aten::layer_norm": _take(F.layer_norm, "input", "normalized_shape", "weight", "bias", "eps"),
    "aten::group_norm": _take(F.group_norm, "input", "num_groups", "weight", "bias", "eps"),
    "aten::dropout": _take(F.dropout, "input", "p", training="train"),
    "aten::dropout_": _take(F.dropout, "input", "p", training="train"),
    "aten::feature_dropout": _take(F.dropout2d, "input", "p", training="train"),
    "aten::embedding": lambda bound: F.embedding(
        bound["indices"],
        bound["weight"],
        None if bound.get("padding_idx", -1) == -1 else bound["padding_idx"],
    ),
    "aten::softmax": _take(F.softmax, "dim", "dtype", input="self"),
    "aten::log_softmax": _take(F.log_softmax, "dim", "dtype", input="self"),
    "aten::gelu": _take(F.gelu, "approximate", input="self"),
    "aten::sym_size": lambda bound: bound["self"].size(bound["dim"]),
    "aten::slice": lambda bound: _slice(**bound),
    "aten::item": lambda bound: bound["self"].item(),
    "aten::_assert_tensor_metadata": lambda bound: None,
    "aten::_assert_scalar": lambda bound: None,
    "aten::lift_fresh_copy": lambda bound: bound["self"],
    "aten::lift_fresh": lambda bound: bound["self"],
    "aten::_to_copy": lambda bound: bound.pop("self").to(**bound),
}


def _slice(self: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    if isinstance(end, int) and end == 9223372036854775807:
        end = None
    cut = slice(start or None, end, step if step != 1 else None)
    return self[(slice(None),) * (dim % self.dim()) + (cut,)]


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
