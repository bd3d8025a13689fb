"""One spelling per call: functions where there is one, methods only where there is none."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F

from fxcompress.ir.ops import op_of

__all__ = ["Call", "spell"]

Call = tuple[Callable[..., Any] | str, tuple[Any, ...], dict[str, Any]]
Speller = Callable[[tuple[Any, ...], dict[str, Any]], Call]

_CASTS: Final = {
    "float": torch.float32, "double": torch.float64, "half": torch.float16,
    "bfloat16": torch.bfloat16, "long": torch.int64, "int": torch.int32, "short": torch.int16,
    "char": torch.int8, "byte": torch.uint8, "bool": torch.bool,
}  # fmt: skip
_PYTHON_TYPES: Final[Mapping[Any, torch.dtype]] = {
    int: torch.int64, float: torch.float64, bool: torch.bool, complex: torch.complex128,
}  # fmt: skip


def spell(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """Return target, args and kwargs of the canonical call that computes the same."""
    # `dtype=int`: a graph's code can only spell what is an object of torch.
    args = tuple(_PYTHON_TYPES.get(each, each) if type(each) is type else each for each in args)
    options = {
        name: _PYTHON_TYPES.get(each, each) if type(each) is type else each
        for name, each in kwargs.items()
    }
    if "inplace" in options:
        options.pop("inplace")
    name = getattr(func, "__name__", "")
    if is_method(func):
        special = _METHODS.get(name)
        if special is not None:
            return special(args, options)
        if name in _CASTS:
            return "to", (args[0], _CASTS[name]), {}
        return _method(name, func, args, options)
    special = _FUNCTIONS.get(func)
    if special is not None:
        return special(args, options)
    return _canonical_function(func), args, options


def is_method(func: Callable[..., Any]) -> bool:
    """Whether `func` is a method of `torch.Tensor`."""
    if getattr(func, "__objclass__", None) is not None:
        return True
    return str(getattr(func, "__qualname__", "")).startswith(("Tensor.", "TensorBase."))


def _canonical_function(func: Callable[..., Any]) -> Callable[..., Any]:
    op = op_of(func)
    if (
        op is None
        or not op.functions
        or func in op.variants
        or isinstance(func, torch._ops.OpOverload)
    ):
        return func
    target = op.functions[0]
    return target if getattr(target, "__name__", "") == getattr(func, "__name__", "") else func


def _method(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    op = op_of(func)
    if op is not None and op.functions:
        if name in op.swapped:
            return op.functions[0], (args[1], args[0]), kwargs
        target = op.functions[0]
        if getattr(target, "__module__", "") != "_operator":
            spread = [i for i, a in enumerate(op.operands) if a.variadic]
            if spread and len(args) > spread[0]:
                args = (*args[: spread[0]], _gathered(args[spread[0] :]))
            return target, args, kwargs
    function = getattr(torch, name, None)
    if callable(function) and not name.startswith("__"):
        return function, args, kwargs
    return name, args, kwargs


def _gathered(values: tuple[Any, ...]) -> Any:
    if len(values) == 1 and isinstance(values[0], (tuple, list)):
        return tuple(values[0])
    return tuple(values)


def _sizes_of(target: Callable[..., Any] | str) -> Speller:
    def respell(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        if len(args) > 1 and not isinstance(args[1], torch.dtype):
            return target, (args[0], _gathered(args[1:])), kwargs
        for name in ("size", "shape"):
            if name in kwargs:
                return target, (args[0], _gathered((kwargs.pop(name),))), kwargs
        return "view", args, kwargs

    return respell


def _spread(target: str) -> Speller:
    def respell(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        sizes = _gathered(args[1:]) if len(args) > 1 else _gathered((next(iter(kwargs.values())),))
        return target, (args[0], *sizes), {}

    return respell


def _squeeze(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    return torch.squeeze, args, kwargs


def _where(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    other = args[2] if len(args) > 2 else kwargs.pop("other")
    return torch.where, (args[1], args[0], other), kwargs


def _getitem(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    return operator.getitem, args, kwargs


def _reverse_divide(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    return operator.truediv, (args[1], args[0]), kwargs


def _as_method(name: str) -> Speller:
    return lambda args, kwargs: (name, args, kwargs)


def _as_function(target: Callable[..., Any]) -> Speller:
    return lambda args, kwargs: (target, args, kwargs)


def _swapped(target: Callable[..., Any]) -> Speller:
    return lambda args, kwargs: (target, (args[1], args[0]), kwargs)


def _permute(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    dims = kwargs.pop("dims", None)
    return torch.permute, (args[0], _gathered(args[1:]) if dims is None else tuple(dims)), kwargs


def _flip(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    dims = kwargs.pop("dims", None)
    return torch.flip, (args[0], _gathered(args[1:]) if dims is None else tuple(dims)), kwargs


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    return torch.split, args, kwargs


def _type_as(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    return "to", (args[0], args[1].dtype), {}


def _type(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    dtype = args[1] if len(args) > 1 else kwargs["dtype"]
    return "to", (args[0], dtype), {}


def _to(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    kept: dict[str, Any] = {}
    places = [*args[1:], kwargs.get("other"), kwargs.get("dtype"), kwargs.get("device")]
    for place in places:
        if isinstance(place, torch.Tensor):
            kept.setdefault("dtype", place.dtype)
        elif isinstance(place, torch.dtype):
            kept["dtype"] = place
        elif isinstance(place, (str, torch.device)):
            kept["device"] = torch.device(place)
    if set(kept) == {"dtype"}:
        return "to", (args[0], kept["dtype"]), {}
    return "to", (args[0],), kept


_METHODS: Final[dict[str, Speller]] = {
    "view": _sizes_of(torch.reshape),
    "reshape": _sizes_of(torch.reshape),
    "expand": _spread("expand"),
    "repeat": _spread("repeat"),
    "permute": _permute,
    "flip": _flip,
    "split": _split,
    "split_with_sizes": _split,
    "squeeze": _squeeze,
    "where": _where,
    "__getitem__": _getitem,
    "__rdiv__": _reverse_divide,
    "__rtruediv__": _reverse_divide,
    "__rsub__": _swapped(torch.sub),
    "__rpow__": _swapped(torch.pow),
    "__rmatmul__": _swapped(torch.matmul),
    "to": _to,
    "type": _type,
    "type_as": _type_as,
    "unfold": _as_method("unfold"),
    "t": _as_function(torch.t),
}


def _rsub(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    if isinstance(args[0], torch.Tensor):
        return torch.sub, (args[0], args[1]), kwargs
    return torch.rsub, (args[1], args[0]), kwargs


def _reverse_subtract(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    return torch.rsub, args, kwargs


_METHODS["__rsub__"] = _reverse_subtract


def _dims_function(target: Callable[..., Any]) -> Speller:
    def respell(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        if len(args) > 1:
            args = (args[0], _gathered(args[1:]))
        return target, args, kwargs

    return respell


_FUNCTIONS: Final[dict[Any, Speller]] = {
    torch.permute: _dims_function(torch.permute),
    torch.reshape: _dims_function(torch.reshape),
    torch.flip: _dims_function(torch.flip),
    torch.split_with_sizes: _as_function(torch.split),
    torch.concat: _as_function(torch.cat),
    torch.concatenate: _as_function(torch.cat),
    torch.swapaxes: _as_function(torch.transpose),
    torch.swapdims: _as_function(torch.transpose),
    torch.multiply: _as_function(torch.mul),
    torch.subtract: _as_function(torch.sub),
    torch.divide: _as_function(torch.div),
    torch.true_divide: _as_function(torch.div),
    torch.clip: _as_function(torch.clamp),
    torch.absolute: _as_function(torch.abs),
    torch.relu: _as_function(F.relu),
    torch.relu_: _as_function(F.relu),
}
