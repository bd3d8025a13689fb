"""The recorder: a function mode that writes every torch-level call into an FX graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch._subclasses import FakeTensor
from torch.overrides import TorchFunctionMode

from fxcompress.errors import CaptureError
from fxcompress.ir._recorder import _handlers
from fxcompress.ir._recorder._constants import evaluate_constant, evaluate_size
from fxcompress.ir._recorder._fake import Transcript, quick_result, run_fake
from fxcompress.ir._recorder._mutation import apply_mutation, is_mutation, scatter_of, store
from fxcompress.ir._recorder._sizes import Sizes, SizeWriter
from fxcompress.ir._recorder._source import current_place, full_place, short_place
from fxcompress.ir._recorder._spelling import spell
from fxcompress.ir._recorder._state import ModelState
from fxcompress.ir._recorder._values import Values, same_storage

__all__ = ["Recorder", "Scope"]

Scope = tuple[tuple[str, str], ...]
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


class Recorder(TorchFunctionMode):
    """Writes calls into `graph`.

    Args:
        state: The model's tensors.
        stand_ins: `id(real tensor)` -> fake tensor.
        sizes: The symbols of the dynamic sizes.
        transcript: Results of fake calls, shared by the recordings of both modes.
        training: Whether the model is recorded in training mode.
    """

    def __init__(
        self,
        state: ModelState,
        stand_ins: Mapping[int, Any],
        sizes: Sizes,
        transcript: Transcript,
        *,
        training: bool,
    ) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.state = state
        self.sizes = sizes
        self.transcript = transcript
        self.training = training
        self.values = Values()
        self.scope: Scope = ()
        self.custom_depth = 0
        self.constants: dict[str, torch.Tensor] = {}
        self.mutated: dict[str, fx.Node] = {}
        self.writer = SizeWriter(self._emit_size, self.node_of)
        self._names = {id(stand_ins[key]): name for key, name in state.names.items()}
        self._names.update(state.names)
        self._attributes: dict[str, fx.Node] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one call and write it."""
        options = dict(kwargs) if kwargs else {}
        handler = _handlers.find(func)
        if handler is not None:
            return handler(self, func, args, options)
        return self.run(func, args, options)

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call on fake tensors and write it, unless its result is an operand unchanged."""
        if is_mutation(func, args, kwargs):
            return apply_mutation(self, func, args, kwargs)
        result = self.fake(func, args, kwargs)
        if self.is_unchanged(result, args):
            return result
        self.write(func, args, kwargs, result)
        return result

    def fake(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call on fake tensors, or take its result from the other mode's recording."""
        return self.transcript.result(func, args, kwargs, lambda: run_fake(func, args, kwargs))

    def is_unchanged(self, result: Any, args: tuple[Any, ...]) -> bool:
        """Whether a call returned its first operand, or nothing that a graph can hold."""
        if isinstance(result, torch.Tensor):
            return bool(args) and result is args[0]
        if isinstance(result, (tuple, list)):
            return not any(isinstance(item, (torch.Tensor, list, tuple)) for item in result)
        return not isinstance(result, dict)

    def write(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> fx.Node:
        """Write the canonical form of a call that gave `result`."""
        target, positional, named = spell(func, args, kwargs)
        node = self.emit(target, positional, named, result)
        source = next((a for a in args if isinstance(a, torch.Tensor)), None)
        self.define(result, node, source, (func, args, kwargs))
        return node

    def emit(
        self,
        target: Callable[..., Any] | str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        value: Any,
        op: str | None = None,
    ) -> fx.Node:
        """Write one node; tensors and sizes in the arguments become nodes."""
        kind = op or ("call_method" if isinstance(target, str) else "call_function")
        # In an index a list picks places and a tuple names dimensions; elsewhere they are the same.
        keep = target is operator.getitem
        node = self.graph.create_node(
            kind, target, self.lower(tuple(args), keep), self.lower(dict(kwargs))
        )
        if value is not None:
            node.meta["val"] = value
        node.meta["scope"] = self.scope
        node.meta["source"] = short_place(current_place())
        if not torch.is_grad_enabled() and not self.custom_depth:
            node.meta["no_grad"] = True
        return node

    def _emit_size(self, target: Any, args: tuple[Any, ...], value: Any) -> fx.Node:
        return self.emit(target, args, {}, value)

    def define(
        self,
        result: Any,
        node: fx.Node,
        source: torch.Tensor | None = None,
        call: tuple[Any, tuple[Any, ...], dict[str, Any]] | None = None,
    ) -> None:
        """Bind the tensors of a result to its node, item by item."""
        if isinstance(result, torch.Tensor):
            self._define_tensor(result, node, source, call)
        elif isinstance(result, (tuple, list)):
            for index, item in enumerate(result):
                if isinstance(item, (torch.Tensor, tuple, list)):
                    part = self.emit(operator.getitem, (node, index), {}, item)
                    self.define(
                        item,
                        part,
                        source,
                        None if call is None else (*call[:2], {**call[2], "__item__": index}),
                    )
        elif isinstance(result, dict):
            for key, item in result.items():
                self.define(item, self.emit(operator.getitem, (node, key), {}, item))

    def _define_tensor(
        self,
        result: torch.Tensor,
        node: fx.Node,
        source: torch.Tensor | None,
        call: tuple[Any, tuple[Any, ...], dict[str, Any]] | None,
    ) -> None:
        parent = None
        if source is not None and call is not None and same_storage(result, source):
            self.node_of(source)
            parent = self.values.find(source)
        if parent is None or call is None:
            self.values.define(result, node)
            return
        again, scatter = scatter_of(self, call, result)
        self.values.define(result, node, parent, again, scatter)

    def node_of(self, tensor: torch.Tensor) -> fx.Node:
        """Return the node of a tensor's present value; state and constants get one when asked."""
        entry = self.values.find(tensor)
        if entry is not None:
            return self.values.read(entry)
        name = self._names.get(id(tensor))
        node = self.node_of_state(name or self.add_constant(tensor), tensor)
        self.values.define(tensor, node)
        return node

    def node_of_state(self, name: str, tensor: torch.Tensor) -> fx.Node:
        """Return the node that reads a parameter, buffer or constant."""
        node = self._attributes.get(name)
        if node is None:
            with self.graph.inserting_before(self._first()):
                node = self.graph.get_attr(name)
            node.meta.update(val=tensor, scope=(), source=None)
            self._attributes[name] = node
        return node

    def _first(self) -> fx.Node:
        # State is read at the top of the graph; cleaning moves it next to its first use.
        return self.graph._root.next if len(self.graph.nodes) else self.graph._root

    def add_constant(self, tensor: torch.Tensor) -> str:
        """Give a tensor that the model's code made a name under the module that made it."""
        if isinstance(tensor, FakeTensor):
            raise CaptureError(
                "a tensor appeared that no recorded call returned",
                reason="compiled or scripted code, or a custom autograd function, made it",
                hint='mark the module as opaque, or use tracer="export"',
                where=full_place(current_place()),
            )
        prefix = f"{self.scope[-1][0]}." if self.scope and self.scope[-1][0] else ""
        count = 0
        while f"{prefix}_constant_{count}" in self.constants:
            count += 1
        name = f"{prefix}_constant_{count}"
        self.constants[name] = tensor
        self._names[id(tensor)] = name
        return name

    def lower(self, value: Any, lists: bool = False) -> Any:
        """Return an argument with its tensors and sizes replaced by nodes, lists by tuples.

        Args:
            value: The argument.
            lists: Whether lists stay lists.
        """
        if isinstance(value, torch.Tensor):
            return self.node_of(value)
        if isinstance(value, _SYMBOLIC):
            return self.writer.node(value)
        if isinstance(value, (tuple, list)):
            items = [self.lower(item, lists) for item in value]
            return items if lists and isinstance(value, list) else tuple(items)
        if isinstance(value, dict):
            return {key: self.lower(item, lists) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(self.lower(value.start), self.lower(value.stop), self.lower(value.step))
        if isinstance(value, np.generic):
            return value.item()
        return value

    def leaf(
        self,
        path: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        forward: Callable[[], Any],
    ) -> Any:
        """Run a leaf module, write its call, and return its result."""
        in_place = getattr(module, "inplace", False) is True

        def compute() -> Any:
            result: Any
            with torch._C.DisableTorchFunction():
                result = quick_result(module, args, kwargs)
                if result is None:
                    result = run_fake(forward, (), {})
                first = args[0] if args else None
                if isinstance(first, torch.Tensor) and result is first and not in_place:
                    # Dropout in evaluation returns its operand; in training it does not. The two
                    # values must be two objects, or what reads the operand later would read the
                    # result.
                    result = first.view_as(first)
            return result

        result = self.transcript.result(path, args, kwargs, compute)
        node = self.emit(path, args, kwargs, result, op="call_module")
        if in_place and args and result is args[0]:
            return store(self, result, node)
        self.define(result, node)
        return result

    def define_constant(
        self, result: torch.Tensor, func: Callable[..., Any], args: Any, kwargs: Any
    ) -> None:
        """Keep a tensor made of literals as a buffer of the module that made it."""
        with torch.utils._python_dispatch._disable_current_modes():
            real = func(*args, **kwargs)
        self.values.define(result, self.node_of_state(self.add_constant(real), result))

    def known_value(self, tensor: torch.Tensor) -> Any:
        """Return what a tensor that no input's data reaches always holds, or None.

        A scalar made of sizes gives a symbolic size; any other gives a real tensor.
        """
        entry = self.values.find(tensor)
        if entry is None:
            return self.constants.get(self._names.get(id(tensor), ""))
        node = self.values.read(entry)
        value = evaluate_constant(node, self.constants)
        return evaluate_size(node) if value is None else value
