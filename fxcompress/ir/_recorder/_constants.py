"""The real value of a tensor that depends on no input, no weight and no chance."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import fx

__all__ = ["evaluate_constant", "evaluate_size"]

# Reading a long constant back into Python is never what a model does by design.
_LIMIT = 10_000


def evaluate_constant(node: fx.Node, constants: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Return the value that `node` always has, or None where it has no such value."""
    order: list[fx.Node] = []
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if len(seen) > _LIMIT or not _is_constant(current, constants):
            return None
        order.append(current)
        stack.extend(current.all_input_nodes)
    env: dict[fx.Node, Any] = {}
    with torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction():
        for current in sorted(order):
            args = fx.map_arg(current.args, lambda n: env[n])
            kwargs = fx.map_arg(current.kwargs, lambda n: env[n])
            if current.op == "get_attr":
                env[current] = constants[str(current.target)]
            elif current.op == "call_method":
                env[current] = getattr(args[0], str(current.target))(*args[1:], **kwargs)
            else:
                env[current] = current.target(*args, **kwargs)  # type: ignore[operator]
    value = env[node]
    return value if isinstance(value, torch.Tensor) else None


def _is_constant(node: fx.Node, constants: Mapping[str, torch.Tensor]) -> bool:
    if node.op == "get_attr":
        return str(node.target) in constants
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return not name.startswith(("rand", "bernoulli", "normal", "multinomial", "dropout"))


_ARITHMETIC: Final[dict[Any, Callable[..., Any]]] = {
    torch.add: operator.add,
    torch.sub: operator.sub,
    torch.rsub: lambda a, b: b - a,
    torch.mul: operator.mul,
    torch.floor_divide: operator.floordiv,
    torch.remainder: operator.mod,
    torch.neg: operator.neg,
    torch.minimum: torch.sym_min,
    torch.maximum: torch.sym_max,
}


def evaluate_size(node: fx.Node) -> Any:
    """Return the symbolic size that a scalar tensor made of sizes holds, or None."""
    if node.target is torch.full and node.args[0] == ():
        value = node.args[1]
        return value.meta.get("val") if isinstance(value, fx.Node) else value
    if node.target == "to":
        return _operand(node.args[0])
    function = _ARITHMETIC.get(node.target)
    if function is None or node.kwargs:
        return None
    operands = [_operand(arg) for arg in node.args]
    return None if any(o is None for o in operands) else function(*operands)


def _operand(value: Any) -> Any:
    return evaluate_size(value) if isinstance(value, fx.Node) else value
