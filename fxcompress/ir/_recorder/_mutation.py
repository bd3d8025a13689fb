"""In-place calls as out-of-place nodes, told to every view of the memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxcompress.errors import CaptureError
from fxcompress.ir._recorder._source import current_place, full_place
from fxcompress.ir._recorder._spelling import is_method

if TYPE_CHECKING:
    from fxcompress.ir._recorder._mode import Recorder

__all__ = ["apply_mutation", "is_mutation", "scatter_of"]


def is_mutation(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call changes one of its operands."""
    if kwargs.get("inplace") is True or kwargs.get("out") is not None:
        return True
    if isinstance(func, torch._ops.OpOverload):
        return bool(func._schema.is_mutable)
    name = getattr(func, "__name__", "")
    if name == "__setitem__":
        return True
    if name.startswith("__i") and name in _INPLACE_OPERATORS:
        return True
    return name.endswith("_") and not name.endswith("__") and name not in _NOT_MUTATIONS


_INPLACE_OPERATORS = frozenset(
    f"__i{name}__"
    for name in "add sub mul truediv div floordiv mod pow and or xor lshift rshift matmul".split()
)
_NOT_MUTATIONS = frozenset({"requires_grad_", "share_memory_", "retain_grad_"})


def apply_mutation(
    recorder: Recorder, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run an in-place call, and write the call that gives the new value."""
    name = getattr(func, "__name__", "")
    if isinstance(func, torch._ops.OpOverload):
        raise _refuse(f"{func} changes a tensor in place")
    if kwargs.get("out") is not None:
        raise _refuse(f"{name}(out=…) writes into a tensor")
    if kwargs.get("inplace") is True:
        return _change(recorder, func, args, {**kwargs, "inplace": False}, args[0])
    if name == "__setitem__":
        from fxcompress.ir._recorder._setitem import set_item

        return set_item(recorder, *args)
    if name.startswith("__i"):
        name = name[3:-2]
        plain = getattr(torch.Tensor, f"__{name}__")
        return _change(recorder, plain, args, kwargs, args[0])
    special = _REPLACEMENTS.get(name)
    if special is not None:
        return special(recorder, args, kwargs)
    return _change(recorder, _out_of_place(func, name), args, kwargs, args[0])


def _refuse(what: str) -> CaptureError:
    return CaptureError(
        what,
        reason="a captured graph changes no tensor in place, and this call has no other form",
        hint="write it out of place, or mark the module as opaque",
        where=full_place(current_place()),
    )


def _out_of_place(func: Callable[..., Any], name: str) -> Callable[..., Any]:
    plain = name[:-1]
    places: list[Any] = [torch.Tensor] if is_method(func) else [torch.nn.functional, torch]
    for place in [*places, torch.Tensor, torch, torch.nn.functional]:
        found = getattr(place, plain, None)
        if callable(found):
            return found  # type: ignore[no-any-return]
    # Random fills have an out-of-place form among the ATen operators only.
    for overloaded in (plain, f"{plain}_functional"):
        found = getattr(torch.ops.aten, overloaded, None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    raise _refuse(f"{name} changes a tensor in place")


def _change(
    recorder: Recorder,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    target: torch.Tensor,
) -> torch.Tensor:
    from fxcompress.ir._recorder._spelling import spell

    result = recorder.fake(func, args, kwargs)
    spelled, positional, named = spell(func, args, kwargs)
    node = recorder.emit(spelled, positional, named, result)
    if result.dtype != target.dtype:
        result = result.to(target.dtype)
        node = recorder.emit("to", (node, target.dtype), {}, result)
    return store(recorder, target, node)


def store(recorder: Recorder, target: torch.Tensor, node: fx.Node) -> torch.Tensor:
    """Say that `target` now holds the value of `node`."""
    recorder.node_of(target)
    entry = recorder.values.find(target)
    assert entry is not None, "node_of defines an entry"
    root = entry.root.node
    if not recorder.values.change(entry, node):
        raise _refuse("a view of a tensor is changed in place")
    if root.op == "get_attr":
        recorder.mutated[str(root.target)] = root
    return target


def _constant(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def apply(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        result = make(*args, **kwargs)
        return store(recorder, args[0], recorder.emit(make, args, kwargs, result))

    return apply


def _copy(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    target, source = args[0], args[1]
    return store(recorder, target, fitted(recorder, source, target))


def fitted(recorder: Recorder, source: Any, target: torch.Tensor) -> fx.Node:
    """Return the node of `source` broadcast and cast to the shape and dtype of `target`."""
    if not isinstance(source, torch.Tensor):
        options = {"dtype": target.dtype, "device": target.device}
        return recorder.emit(torch.full, (tuple(target.shape), source), options, target)
    node = recorder.node_of(source)
    value: torch.Tensor = source
    if value.dtype != target.dtype:
        value = value.to(target.dtype)
        node = recorder.emit("to", (node, target.dtype), {}, value)
    if tuple(value.shape) != tuple(target.shape):
        value = value.expand(target.shape)
        node = recorder.emit("expand", (node, *target.shape), {}, value)
    return node


def _random(
    make: Callable[..., torch.Tensor], defaults: tuple[float, float], names: tuple[str, str]
) -> Callable[..., torch.Tensor]:
    def apply(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        target = args[0]
        given = {**dict(zip(names, defaults, strict=True)), **kwargs}
        given.update(zip(names, args[1:], strict=False))
        low, high = given[names[0]], given[names[1]]
        scale = high - low if make is torch.rand_like else high
        node = recorder.emit(make, (target,), {}, target)
        if scale != 1:
            node = recorder.emit(torch.mul, (node, scale), {}, target)
        if low != 0:
            node = recorder.emit(torch.add, (node, low), {}, target)
        return store(recorder, target, node)

    return apply


def _bernoulli(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    target = args[0]
    probability = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
    if isinstance(probability, torch.Tensor):
        node = recorder.emit(torch.bernoulli, (probability,), {}, target)
    else:
        node = recorder.emit(torch.bernoulli, (target, probability), {}, target)
    return store(recorder, target, node)


_REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "zero_": _constant(torch.zeros_like),
    "fill_": _constant(torch.full_like),
    "copy_": _copy,
    "uniform_": _random(torch.rand_like, (0.0, 1.0), ("from", "to")),
    "normal_": _random(torch.randn_like, (0.0, 1.0), ("mean", "std")),
    "bernoulli_": _bernoulli,
}


Again = Callable[[fx.Node], fx.Node]
Scatter = Callable[[fx.Node, fx.Node], fx.Node]


def scatter_of(
    recorder: Recorder, call: tuple[Any, tuple[Any, ...], dict[str, Any]], result: torch.Tensor
) -> tuple[Again | None, Scatter | None]:
    """Return how to take a view again, and how to write a changed view back into its parent."""
    from fxcompress.ir._recorder._views import view_of

    return view_of(recorder, call, result)
