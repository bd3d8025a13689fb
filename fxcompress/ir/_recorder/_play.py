"""Record an `fx.GraphModule` node by node, so that the scopes its nodes remember are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from fxcompress.ir._calling import CallLike
from fxcompress.ir._recorder._mode import Recorder, Scope
from fxcompress.ir.modules import qualified_class

__all__ = ["GraphPlayer", "plays", "scope_of"]


def plays(module: Any) -> bool:
    """Whether a model is a graph module whose nodes remember the modules they came from."""
    return isinstance(module, fx.GraphModule) and any(
        "scope" in node.meta or "nn_module_stack" in node.meta for node in module.graph.nodes
    )


def scope_of(node: fx.Node) -> Scope:
    """Return the scope that a node of a Program or of an exported program remembers."""
    if "scope" in node.meta:
        return tuple(node.meta["scope"])
    stack = node.meta.get("nn_module_stack") or {}
    scope = []
    for path, cls in stack.values():
        path = path.split("@")[0]
        if path:
            scope.append((path, cls if isinstance(cls, str) else qualified_class(cls)))
    return tuple((path, _public(cls)) for path, cls in scope)


def _public(cls: str) -> str:
    return f"torch.nn.{cls.rpartition('.')[2]}" if cls.startswith("torch.nn.modules.") else cls


class GraphPlayer:
    """Runs the nodes of a graph module one by one.

    Args:
        module: The (copied) graph module.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self._module = module

    def __call__(self, recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the graph on fake inputs and return the output in its structure."""
        leaves = _leaves(self._module, args, kwargs)
        if leaves is None:
            return self._module(*args, **kwargs)
        result = _ScopedInterpreter(self._module, recorder).run(*leaves, enable_io_processing=False)
        recorder.scope = ()
        return self._module.graph.process_outputs(result)


class _ScopedInterpreter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, recorder: Recorder) -> None:
        super().__init__(module)
        self._recorder = recorder
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        if n.op not in ("call_function", "call_method", "call_module"):
            return super().run_node(n)
        self._recorder.scope = scope_of(n)
        return super().run_node(n)


def _leaves(
    module: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Any] | None:
    holders = len(module.graph.find_nodes(op="placeholder"))
    codegen = module.graph._codegen
    if isinstance(codegen, CallLike):
        return list(codegen.signature.flatten(args, kwargs))
    leaves = pytree.tree_leaves((args, dict(kwargs)))
    return leaves if len(leaves) == holders else None
