"""One name per operation: the table that nn, functional, method and ATen spellings map to."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import torch
from torch import fx, nn

from fxcompress.ir._optable import ROWS, Attr, Kind, Op
from fxcompress.ir.modules import describe, is_stock, qualified_class
from fxcompress.nn.tap import Tap

__all__ = [
    "Attr",
    "Kind",
    "Op",
    "all_ops",
    "attributes",
    "bind",
    "is_inplace",
    "is_known",
    "is_scalar",
    "is_tap",
    "module_of",
    "op_name",
    "op_of",
    "op_spec",
    "operands",
    "qualified_name",
]

# What the type already shows; a text that repeats it says nothing.
_SIZES: Final = frozenset(
    {
        "in_features", "out_features", "in_channels", "out_channels", "num_features",
        "num_channels", "num_embeddings", "embedding_dim", "input_size", "hidden_size", "shape",
        "inplace",
    }
)  # fmt: skip
_SHORT: Final = {"kernel_size": "k"}
_PER_DIMENSION: Final = frozenset(
    {"k", "kernel_size", "stride", "padding", "dilation", "output_padding", "output_size"}
)
_CASTS: Final = {
    "float": torch.float32, "double": torch.float64, "half": torch.float16,
    "bfloat16": torch.bfloat16, "long": torch.int64, "int": torch.int32, "short": torch.int16,
    "char": torch.int8, "byte": torch.uint8, "bool": torch.bool,
}  # fmt: skip


def all_ops() -> tuple[Op, ...]:
    """Return every row of the table."""
    return ROWS


@cache
def _by_name() -> dict[str, Op]:
    return {op.name: op for op in ROWS}


@cache
def _by_function() -> dict[Any, Op]:
    return {function: op for op in reversed(ROWS) for function in op.functions}


@cache
def _by_method() -> dict[str, Op]:
    return {method: op for op in reversed(ROWS) for method in (*op.methods, *op.swapped)}


@cache
def _by_module() -> dict[str, Op]:
    return {module: op for op in ROWS for module in op.modules}


@cache
def _by_overload() -> dict[str, Op]:
    return {overload: op for op in reversed(ROWS) for overload in op.overloads}


def op_spec(name: str) -> Op | None:
    """Return the row called `name`, or None."""
    return _by_name().get(name)


def op_of(target: Callable[..., Any] | str | nn.Module) -> Op | None:
    """Return the op that a function, tensor method, ATen overload or module computes, or None.

    Args:
        target: A callable, a `torch.Tensor` method, a method's name, or a leaf module. In-place
            spellings (`add_`) give the op of their out-of-place form.
    """
    if isinstance(target, nn.Module):
        return _by_module().get(qualified_class(type(target)))
    if isinstance(target, str):
        return _method(target)
    if isinstance(target, torch._ops.OpOverload):
        return _overload(target._schema.name)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return _overload(target._qualified_op_name)
    found = _by_function().get(target)
    if found is None and getattr(target, "__objclass__", None) is not None:
        return _method(target.__name__)
    if found is None and str(getattr(target, "__qualname__", "")).startswith("Tensor."):
        return _method(target.__name__)
    return found or _inplace_function(target)


def _method(name: str) -> Op | None:
    table = _by_method()
    found = table.get(name)
    if found is None and name.startswith("__i") and name.endswith("__"):
        found = table.get(f"__{name[3:]}")
    if found is None and name.endswith("_") and not name.endswith("__"):
        found = table.get(name[:-1])
    return found


def _overload(qualified: str) -> Op | None:
    space, _, name = qualified.partition("::")
    table = _by_overload()
    if space != "aten":
        return table.get(qualified)
    return table.get(name) or table.get(name.rstrip("_"))


def _inplace_function(target: Callable[..., Any]) -> Op | None:
    name = getattr(target, "__name__", "")
    module = getattr(target, "__module__", "") or ""
    if name.endswith("_") and not name.endswith("__") and module.startswith("torch"):
        return _by_name().get(name[:-1])
    if module == "_operator" and name.startswith("i"):
        return _method(f"__{name[1:]}__")
    return None


def qualified_name(target: Callable[..., Any] | str) -> str:
    """Return where a callable is found: `torch.relu`, `Tensor.view`, `aten.add.Tensor`.

    Names do not depend on which private module of torch defines the function.
    """
    if isinstance(target, str):
        return f"Tensor.{target}"
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(target)
    name = str(getattr(target, "__name__", target))
    for space, prefix in _public_spaces():
        # The functions of torch.fft, linalg and special call themselves `fft_fftn` and so on.
        for spelled in (name, name.removeprefix(f"{prefix.rpartition('.')[2]}_")):
            if getattr(space, spelled, None) is target:
                return f"{prefix}.{spelled}"
    module = str(getattr(target, "__module__", "") or "").replace("_operator", "operator")
    return f"{module}.{getattr(target, '__qualname__', name)}".lstrip(".")


@cache
def _public_spaces() -> tuple[tuple[Any, str], ...]:
    import operator

    return (
        (torch.nn.functional, "torch.nn.functional"),
        (torch, "torch"),
        (operator, "operator"),
        (torch.fft, "torch.fft"),
        (torch.linalg, "torch.linalg"),
        (torch.special, "torch.special"),
        (torch._C._nn, "torch._C._nn"),
    )


def module_of(node: fx.Node) -> nn.Module:
    """Return the leaf module that a `call_module` node calls."""
    owner = node.graph.owning_module
    assert owner is not None, "a Program's graph always has its module"
    return owner.get_submodule(str(node.target))


def _spec_of(node: fx.Node) -> Op | None:
    if node.op == "call_module":
        return op_of(module_of(node))
    if node.op in ("call_function", "call_method"):
        return op_of(node.target)
    return None


def is_known(node: fx.Node) -> bool:
    """Whether the table has a row for what the node computes."""
    return node.op in ("placeholder", "get_attr", "output") or _spec_of(node) is not None


def op_name(node: fx.Node) -> str:
    """Return the canonical name of what a node computes.

    `input`, `param`, `buffer` and `output` for the nodes that compute nothing; the qualified name
    of the function or class where the table has no row.
    """
    if node.op == "placeholder":
        return "input"
    if node.op == "output":
        return "output"
    if node.op == "get_attr":
        return "param" if isinstance(_attribute(node), nn.Parameter) else "buffer"
    spec = _spec_of(node)
    if spec is not None:
        return spec.name
    if node.op == "call_module":
        return qualified_class(type(module_of(node)))
    return qualified_name(node.target)


def _attribute(node: fx.Node) -> Any:
    owner: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        owner = getattr(owner, part)
    return owner


def bind(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call by the table's parameter names, defaults left out.

    For an unknown op positional arguments are called `arg0`, `arg1`, ….
    """
    spec = _spec_of(node)
    if spec is None or node.op == "call_module":
        return {**_bind_module(() if spec is None else spec.operands, node.args), **node.kwargs}
    args = tuple(node.args)
    if node.op == "call_method" and node.target in spec.swapped and len(args) == 2:
        args = (args[1], args[0])
    if spec.name == "to":
        return _bind_cast(node)
    return spec.bind(args, node.kwargs, node.target)


def _bind_module(operands: tuple[Attr, ...], args: tuple[Any, ...]) -> dict[str, Any]:
    bound: dict[str, Any] = {}
    for place, value in enumerate(args):
        if place >= len(operands):
            bound[f"arg{place}"] = value
        elif operands[place].variadic:
            return {**bound, operands[place].name: tuple(args[place:])}
        else:
            bound[operands[place].name] = value
    return bound


def _bind_cast(node: fx.Node) -> dict[str, Any]:
    bound: dict[str, Any] = {"input": node.args[0]}
    method = node.target if isinstance(node.target, str) else ""
    if method in _CASTS:
        bound["dtype"] = _CASTS[method]
    elif method in ("cpu", "cuda"):
        bound["device"] = torch.device(method)
    flags = iter(("non_blocking", "copy"))
    for value in node.args[1:]:
        if isinstance(value, torch.dtype):
            bound["dtype"] = value
        elif isinstance(value, (torch.device, str, int)) and not isinstance(value, bool):
            bound["device"] = torch.device(value)
        elif isinstance(value, bool):
            bound[next(flags)] = value
        else:
            bound["other"] = value
    return {**bound, **node.kwargs}


def operands(node: fx.Node) -> list[Any]:
    """Return what stands between the parentheses in a text: nodes and required values, in order."""
    spec = _spec_of(node)
    if spec is None or node.op == "call_module":
        return list(node.args)
    bound = bind(node)
    values = [(a, bound.get(a.name, a.default)) for a in spec.operands]
    while values and not values[-1][0].required and _is_default(values[-1][0], values[-1][1]):
        values.pop()
    return [value for attr, value in values if attr.name in bound or not attr.required]


def attributes(node: fx.Node) -> dict[str, Any]:
    """Return the non-default attributes of a node, in table order.

    For a leaf module these are its constructor arguments, without the sizes its type shows; equal
    values per dimension are given once (`stride=(2, 2)` is `2`).
    """
    if node.op in ("placeholder", "get_attr", "output"):
        return {}
    if node.op == "call_module":
        return {**_module_attributes(module_of(node)), **node.kwargs}
    spec = _spec_of(node)
    if spec is None:
        return dict(node.kwargs)
    bound = bind(node)
    shown = {attr.name for attr in spec.operands}
    result = {}
    for attr in spec.attrs:
        shown.add(attr.name)
        if attr.name not in bound or attr.name.startswith("_"):
            continue
        value = _collapse(attr.name, bound[attr.name])
        if not _is_default(attr, value):
            result[attr.name] = value
    result.update({key: value for key, value in bound.items() if key not in shown})
    if result.get("inplace") is False:
        del result["inplace"]
    return result


def _module_attributes(module: nn.Module) -> dict[str, Any]:
    if not is_stock(module):
        return {}
    return {
        _SHORT.get(name, name): _collapse(name, value)
        for name, value in describe(module).nondefault().items()
        if name not in _SIZES
    }


def _collapse(name: str, value: Any) -> Any:
    if name in _PER_DIMENSION and isinstance(value, (tuple, list)) and value:
        first = value[0]
        if all(type(item) is type(first) and item == first for item in value):
            return first
    return value


def _is_default(attr: Attr, value: Any) -> bool:
    if isinstance(value, fx.Node):
        return False
    if isinstance(value, bool) != isinstance(attr.default, bool):
        return False
    return bool(value == attr.default)


def is_scalar(node: fx.Node) -> bool:
    """Whether a node's result is a size or a number, not a tensor."""
    value = node.meta.get("val")
    return isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))


def is_tap(node: fx.Node) -> bool:
    """Whether a node is a tap, which is kept although nothing reads it."""
    return node.op == "call_module" and isinstance(module_of(node), Tap)


_INPLACE_FUNCTIONS: Final = frozenset({"setitem"})


def is_inplace(node: fx.Node) -> bool:
    """Whether a node changes one of its operands."""
    if node.kwargs.get("inplace") is True or node.kwargs.get("out") is not None:
        return True
    if node.op == "call_module":
        return getattr(module_of(node), "inplace", False) is True
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    module = getattr(node.target, "__module__", "") or ""
    if module == "_operator" and name.startswith("i") and f"__{name}__" in _operator_inplace():
        return True
    in_torch = isinstance(node.target, str) or module.startswith("torch") or module == ""
    trailing = name.endswith("_") and not name.endswith("__")
    return (in_torch and trailing) or op_name(node) in _INPLACE_FUNCTIONS


@cache
def _operator_inplace() -> frozenset[str]:
    import operator

    return frozenset(
        name for name in dir(operator) if name.startswith("__i") and name not in _NOT_INPLACE
    )


_NOT_INPLACE: Final = frozenset({"__inv__", "__invert__", "__index__", "__init__"})
