"""Run a part of a graph on small random tensors, to see what it computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import fx

from fxcompress.ir.ops import module_of, op_name, op_spec
from passes.moe._lift.miss import Miss

__all__ = ["Sizes", "Stub", "evaluate", "is_dropout", "needed"]

_PRIMES: Final = (3, 5, 2, 7, 11, 13)
# Constants that say where tokens go, and no weights.
_SMALL: Final = 4096


@dataclass
class Sizes:
    """A small number for each dynamic size."""

    numbers: dict[Any, int] = field(default_factory=dict)

    def of(self, size: Any) -> int:
        """Return the number for a size, which may be an expression of others."""
        if isinstance(size, int):
            return size
        expression = size.node.expr
        for symbol in sorted(expression.free_symbols, key=str):
            self.numbers.setdefault(symbol, _PRIMES[len(self.numbers) % len(_PRIMES)])
        return int(expression.subs(self.numbers))

    def shape(self, node: fx.Node) -> list[int]:
        """Return a traced tensor's shape in small numbers."""
        return [self.of(size) for size in node.meta["val"].shape]


@dataclass(frozen=True)
class Stub:
    """What stands for a node in a trial: a function of other nodes' values."""

    reads: tuple[fx.Node, ...]
    run: Callable[..., Any]


def needed(target: fx.Node, known: Mapping[fx.Node, Any], stubs: Mapping[fx.Node, Stub]) -> Any:
    """Return what must be run for `target`, given some values, in graph order."""
    found: set[fx.Node] = set()
    stack = [target]
    while stack:
        node = stack.pop()
        if node in found or node in known:
            continue
        found.add(node)
        if _is_size(node):
            continue
        stack.extend(stubs[node].reads if node in stubs else node.all_input_nodes)
    return sorted(found)


def evaluate(
    target: fx.Node,
    known: Mapping[fx.Node, Any],
    stubs: Mapping[fx.Node, Stub],
    sizes: Sizes,
    changed: Mapping[fx.Node, tuple[Any, Any]] | None = None,
) -> Any:
    """Return the value of a node.

    Args:
        target: The node.
        known: Values of the nodes where the part begins.
        stubs: What stands for some nodes.
        sizes: Numbers for dynamic sizes.
        changed: Other positional and keyword arguments for some nodes.

    Raises:
        Miss: It needs something else, or cannot be run.
    """
    values = dict(known)
    pending = needed(target, known, stubs)
    waiting = {node: _reads(node, stubs) for node in pending}
    # Stubs may read what comes after them in the graph.
    while waiting:
        ready = [n for n, reads in waiting.items() if all(r in values for r in reads)]
        if not ready:
            raise Miss("it cannot be tried", target)
        for node in ready:
            del waiting[node]
            given = (changed or {}).get(node, (node.args, node.kwargs))
            values[node] = _run(node, values, stubs, sizes, given)
    return values[target]


def _reads(node: fx.Node, stubs: Mapping[fx.Node, Stub]) -> tuple[fx.Node, ...]:
    if _is_size(node):
        return ()
    return stubs[node].reads if node in stubs else tuple(node.all_input_nodes)


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def _run(
    node: fx.Node,
    values: Mapping[fx.Node, Any],
    stubs: Mapping[fx.Node, Stub],
    sizes: Sizes,
    given: tuple[Any, Any],
) -> Any:
    if node in stubs:
        return stubs[node].run(*(values[each] for each in stubs[node].reads))
    if _is_size(node):
        return sizes.of(node.meta["val"])
    if node.op == "placeholder":
        raise Miss(f"it reads the input {node.target}", node)
    if node.op == "get_attr":
        return _constant(node)
    if is_dropout(node):
        return values[node.all_input_nodes[0]]
    args, kwargs = fx.node.map_arg(given, values.__getitem__)
    kwargs = {**kwargs, "device": "cpu"} if "device" in kwargs else dict(kwargs)
    try:
        if node.op == "call_module":
            module = module_of(node)
            if next(module.parameters(), None) is not None:
                raise Miss(f"{node.target} has parameters", node)
            return module(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        target: Any = node.target
        return target(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise Miss(f"it cannot be tried: {str(error).splitlines()[0]}", node) from error


def is_dropout(node: fx.Node) -> bool:
    """Whether a node drops values while training; in a trial it drops none."""
    spec = op_spec(op_name(node))
    return spec is not None and spec.kind == "dropout" and bool(node.all_input_nodes)


def _constant(node: fx.Node) -> torch.Tensor:
    value: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    if value.is_meta or value.numel() > _SMALL or isinstance(value, torch.nn.Parameter):
        raise Miss(f"it reads {node.target}", node)
    return value.detach()  # type: ignore[no-any-return]
