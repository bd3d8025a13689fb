"""Calls that are not simply run and written: shapes, reads of data, constants, asserts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import _disable_current_modes

from fxcompress.errors import CaptureError
from fxcompress.ir._recorder._overloads import call_overload, public_form
from fxcompress.ir._recorder._source import current_place, full_place

if TYPE_CHECKING:
    from fxcompress.ir._recorder._mode import Recorder

__all__ = ["find"]

Handler = Callable[["Recorder", Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def find(func: Callable[..., Any]) -> Handler | None:
    """Return the handler of a function, or None where it is run and written as it is."""
    handler = _HANDLERS.get(func)
    if handler is None and getattr(func, "__name__", "") in ("__get__", "__set__"):
        return _property
    if isinstance(func, torch._ops.OpOverload) and public_form(func) is not None:
        return _overload
    return handler


def _overload(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with recorder:
        return call_overload(func, args, kwargs)


def _property(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    descriptor = func.__self__
    if descriptor not in _PROPERTIES:
        result = func(*args, **kwargs)
        if descriptor is torch.Tensor.shape:
            recorder.writer.asked(args[0], result)
        if not isinstance(result, torch.Tensor):
            return result
    else:
        result = recorder.fake(func, args, kwargs)
    method = _PROPERTIES.get(descriptor)
    if method is None:
        name = getattr(descriptor, "__name__", "attribute")
        raise CaptureError(
            f"the tensor attribute {name!r} cannot be recorded",
            hint="mark the module as opaque",
            where=full_place(current_place()),
        )
    if result is args[0]:
        return result
    call, rest = method(args[0])
    recorder.write(call, (args[0], *rest), {}, result)
    return result


def _reversed_dims(tensor: torch.Tensor) -> tuple[Any, tuple[Any, ...]]:
    return torch.permute, (tuple(range(tensor.dim() - 1, -1, -1)),)


_PROPERTIES: Final[dict[Any, Callable[[torch.Tensor], tuple[Any, tuple[Any, ...]]]]] = {
    torch.Tensor.T: _reversed_dims,
    torch.Tensor.mT: lambda tensor: (torch.transpose, (-2, -1)),
    torch.Tensor.data: lambda tensor: (torch.detach, ()),
    torch.Tensor.real: lambda tensor: (torch.real, ()),
    torch.Tensor.imag: lambda tensor: (torch.imag, ()),
}


def _size(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    recorder.writer.asked(args[0], tuple(args[0].shape))
    return func(*args, **kwargs)


def _read_data(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    known = recorder.known_value(args[0]) if args and isinstance(args[0], torch.Tensor) else None
    if isinstance(known, torch.Tensor) and len(args) == 1:
        with _disable_current_modes():
            return func(known, **kwargs)
    if known is not None and func in _SCALAR_READS:
        return known if func is torch.Tensor.item else _SCALAR_READS[func](known)
    name = getattr(func, "__name__", str(func)).strip("_")
    raise CaptureError(
        f"the model reads the data of a tensor ({name}) while it runs",
        reason="what it does next may depend on that data, and a graph has one course only",
        hint="make the branch depend on sizes or settings instead, pass the value as an argument "
        "that is no tensor, or mark the module as opaque",
        where=full_place(current_place()),
    )


_SCALAR_READS: Final[dict[Any, Callable[[Any], Any]]] = {
    torch.Tensor.item: lambda value: value,
    torch.Tensor.__int__: int,
    torch.Tensor.__index__: int,
    torch.Tensor.__float__: float,
    torch.Tensor.__bool__: bool,
}


def _getitem(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return recorder.run(func, (args[0], _numbered(recorder, args[1]), *args[2:]), kwargs)


def _numbered(recorder: Recorder, index: Any) -> Any:
    """Return an index whose slices have numbers for bounds; torch would read tensors' data."""
    if isinstance(index, tuple):
        return tuple(_numbered(recorder, item) for item in index)
    if not isinstance(index, slice):
        return index
    bounds = (index.start, index.stop, index.step)
    return slice(
        *(
            _read_data(recorder, torch.Tensor.item, (b,), {}) if isinstance(b, torch.Tensor) else b
            for b in bounds
        )
    )


def _iterate(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return iter(recorder.run(torch.unbind, (args[0], 0), {}))


def _constant(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if _symbolic((args, kwargs)):
        return _from_sizes(recorder, func, args, kwargs)
    result = recorder.fake(func, args, kwargs)
    if args and result is args[0]:
        return result
    if any(isinstance(a, torch.Tensor) for a in args):
        recorder.write(torch.clone, args[:1], {}, result)
        return result
    recorder.define_constant(result, func, args, kwargs)
    return result


def _symbolic(value: Any) -> bool:
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return True
    if isinstance(value, dict):
        return any(_symbolic(v) for v in value.values())
    return isinstance(value, (tuple, list)) and any(_symbolic(v) for v in value)


def _from_sizes(
    recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    data = args[0] if args else kwargs["data"]
    options = {k: v for k, v in kwargs.items() if k in ("dtype", "device") and v is not None}
    if isinstance(data, (tuple, list)):
        options.setdefault("dtype", torch.int64)
        items = [_from_sizes(recorder, func, (item,), options) for item in data]
        return recorder.run(torch.stack, (items,), {})
    if not isinstance(data, torch.SymFloat) and not isinstance(data, float):
        options.setdefault("dtype", torch.int64)
    return recorder.run(torch.full, ((), data), options)


def _as_tensor(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    data = args[0] if args else kwargs["data"]
    if isinstance(data, torch.Tensor):
        options = {k: v for k, v in kwargs.items() if k in ("dtype", "device") and v is not None}
        return recorder.run(torch.Tensor.to, (data,), options) if options else data
    return _constant(recorder, func, args, kwargs)


def _new_tensor(
    recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    owner, data = args[0], args[1] if len(args) > 1 else kwargs["data"]
    dtype = kwargs.get("dtype") or owner.dtype
    device = kwargs.get("device") or owner.device
    return _constant(recorder, torch.tensor, (data,), {"dtype": dtype, "device": device})


def _write_always(
    recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    # In eval mode dropout returns its operand; the training graph needs the same node.
    named = {**dict(zip(("input", "p", "training", "inplace"), args, strict=False)), **kwargs}
    tensor = named.pop("input")
    in_place = named.pop("inplace", False)
    result = recorder.fake(torch.empty_like, (tensor,), {})
    node = recorder.write(func, (tensor,), named, result)
    if in_place:
        from fxcompress.ir._recorder._mutation import store

        return store(recorder, tensor, node)
    return result


def _skip(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    return None


def _run_only(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


def _attention(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from fxcompress.ir._recorder._attention import MultiHeadAttention

    with recorder:
        return MultiHeadAttention(*args, **kwargs).compute()


_READS = (
    "item tolist numpy __bool__ __int__ __float__ __index__ __complex__ __array__ is_nonzero "
    "__contains__"
).split()


def _table() -> dict[Any, Handler]:
    table: dict[Any, Handler] = {getattr(torch.Tensor, name): _read_data for name in _READS}
    table.update(
        {
            torch.equal: _read_data,
            torch.Tensor.equal: _read_data,
            torch.allclose: _read_data,
            torch.Tensor.allclose: _read_data,
            torch.is_nonzero: _read_data,
            torch.Tensor.size: _size,
            torch.Tensor.__iter__: _iterate,
            torch.Tensor.__getitem__: _getitem,
            torch.Tensor.__setitem__: _getitem,
            torch.tensor: _constant,
            torch.scalar_tensor: _constant,
            torch.as_tensor: _as_tensor,
            torch.asarray: _as_tensor,
            torch.Tensor.new_tensor: _new_tensor,
            torch.Tensor.requires_grad_: _run_only,
            torch.Tensor.__repr__: _run_only,
            torch.Tensor.__format__: _run_only,
            torch._assert: _skip,
            torch._assert_async: _skip,
            F.multi_head_attention_forward: _attention,
        }
    )
    dropouts = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout)
    table.update(dict.fromkeys((*dropouts, F.feature_alpha_dropout, torch.dropout), _write_always))
    return table


_HANDLERS: Final = _table()
