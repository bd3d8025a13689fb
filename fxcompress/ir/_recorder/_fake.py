"""Run calls on fake tensors: once per call for both modes, and cheaply where a shape is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher

from fxcompress.ir._recorder._recurrent import recurrent_result
from fxcompress.ir.ops import op_of

__all__ = ["Transcript", "fill_values", "quick_result", "run_fake"]

# What C++ kernels say that were written before sizes could be symbols.
_NEEDS_PYTHON: Final = ("SymIntArrayRef", "symbolic sizes", "SymInt")


def run_fake(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return `func(*args, **kwargs)`.

    Where a C++ kernel cannot take symbolic sizes, the Python decompositions are tried; they are
    slower, so they are not tried first.
    """
    try:
        return func(*args, **kwargs)
    except (RuntimeError, TypeError) as error:
        if not any(sign in str(error) for sign in _NEEDS_PYTHON):
            raise
        with enable_python_dispatcher():
            return func(*args, **kwargs)


def fill_values(graph: fx.Graph) -> None:
    """Give every node that rewriting an in-place call added the value it computes."""
    for node in graph.nodes:
        if "val" in node.meta or node.op not in ("call_function", "call_method"):
            continue
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
        if isinstance(node.target, str):
            node.meta["val"] = run_fake(getattr(args[0], node.target), tuple(args[1:]), kwargs)
        else:
            node.meta["val"] = run_fake(node.target, tuple(args), kwargs)


class Transcript:
    """The results of the evaluation recording, used again by the training recording.

    The two make the same calls but for a few, so most of the second need not be computed: while a
    call has the same function and operands as the next one written down, its result is the same
    fake tensor.
    """

    # How many calls that only evaluation makes may be skipped to find the place again.
    _WINDOW: Final = 16

    def __init__(self) -> None:
        self._entries: list[tuple[Any, Any]] = []
        self._position = 0
        self.replaying = False

    def rewind(self) -> None:
        """Begin to use the results again."""
        self._position, self.replaying = 0, True

    def result(
        self,
        what: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        compute: Callable[[], Any],
    ) -> Any:
        """Return the result of a call, computed unless it is on record.

        Args:
            what: The function, or the name of the leaf module.
            args: Positional operands.
            kwargs: Keyword operands; those that only modes differ in do not count.
            compute: Makes the call.
        """
        key = (what, _operands(what, args, kwargs))
        if not self.replaying:
            value = compute()
            self._entries.append((key, value))
            return value
        for place in range(self._position, min(self._position + self._WINDOW, len(self._entries))):
            known, value = self._entries[place]
            if known == key:
                self._position = place + 1
                return value
        return compute()


_MODE_OPERANDS: Final[dict[Any, tuple[str, ...]]] = {
    F.scaled_dot_product_attention: ("dropout_p",),
    F.batch_norm: ("training", "momentum"),
}


def _operands(what: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    ignored = None if isinstance(what, str) else _MODE_OPERANDS.get(what)
    if ignored is not None:
        op = op_of(what)
        if op is not None:
            bound = op.bind(args, kwargs, what)
            return _token({k: v for k, v in bound.items() if k not in ignored})
    return _token(args), _token(kwargs)


def _token(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return id(value)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return "size", value.node.expr
    if isinstance(value, (tuple, list)):
        return tuple(_token(item) for item in value)
    if isinstance(value, Mapping):
        return tuple((key, _token(item)) for key, item in value.items())
    if isinstance(value, slice):
        return "slice", _token(value.start), _token(value.stop), _token(value.step)
    try:
        hash(value)
    except TypeError:
        return id(value)
    return type(value), value


def quick_result(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the fake result of a stock module whose type follows from its input's, or None.

    Only what is surely right is answered; any misfit is left to the module, which explains it.
    """
    if isinstance(module, nn.RNNBase):
        return recurrent_result(module, args, kwargs)
    if len(args) != 1 or kwargs or not isinstance(args[0], torch.Tensor):
        return None
    rule = _QUICK.get(type(module))
    x = args[0]
    if rule is None or not x.is_floating_point() or torch.is_autocast_enabled("cpu"):
        return None
    return rule(module, x)


def _linear(module: Any, x: torch.Tensor) -> torch.Tensor | None:
    fits = x.dim() and x.dtype == module.weight.dtype and _is(x.shape[-1], module.in_features)
    return x.new_empty((*x.shape[:-1], module.out_features)) if fits else None


def _layer_norm(module: Any, x: torch.Tensor) -> torch.Tensor | None:
    shape = module.normalized_shape
    fits = module.weight is None or module.weight.dtype == x.dtype
    if not fits or len(shape) > x.dim():
        return None
    if not all(_is(a, b) for a, b in zip(x.shape[-len(shape) :], shape, strict=True)):
        return None
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _batch_norm(dims: tuple[int, ...]) -> Callable[[Any, torch.Tensor], torch.Tensor | None]:
    def rule(module: Any, x: torch.Tensor) -> torch.Tensor | None:
        fits = module.weight is None or module.weight.dtype == x.dtype
        if not fits or x.dim() not in dims or not _is(x.shape[1], module.num_features):
            return None
        return torch.empty_like(x)

    return rule


def _elementwise(module: Any, x: torch.Tensor) -> torch.Tensor:
    return x if getattr(module, "inplace", False) is True else torch.empty_like(x)


def _is(size: Any, number: int) -> bool:
    return isinstance(size, int) and size == number


_QUICK: Final[dict[type, Callable[[Any, torch.Tensor], torch.Tensor | None]]] = {
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
    nn.BatchNorm1d: _batch_norm((2, 3)),
    nn.BatchNorm2d: _batch_norm((4,)),
    nn.BatchNorm3d: _batch_norm((5,)),
    **dict.fromkeys(
        (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid,
         nn.LeakyReLU, nn.ELU, nn.Mish, nn.Dropout),
        _elementwise,
    ),
}  # fmt: skip
