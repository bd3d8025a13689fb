"""ATen overloads as the functions of torch that a model's author would call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F

__all__ = ["call_overload", "public_form"]


def call_overload(
    target: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Make the call of an overload through the public function, if there is one."""
    form = public_form(target)
    return target(*args, **kwargs) if form is None else form(args, kwargs)


def public_form(
    target: torch._ops.OpOverload,
) -> Callable[[tuple[Any, ...], dict[str, Any]], Any] | None:
    """Return what makes an overload's call through a public function, or None."""
    special = _SPECIAL.get(target._schema.name)
    if special is not None:
        names = [argument.name for argument in target._schema.arguments]
        return lambda args, kwargs: special({**dict(zip(names, args, strict=False)), **kwargs})
    if target.namespace != "aten":
        return None
    name = target._schema.name.partition("::")[2]
    for space in (F, torch, torch.Tensor):
        function = getattr(space, name, None)
        if callable(function):
            return lambda args, kwargs: function(*args, **kwargs)
    return None


def _take(function: Callable[..., Any], *names: str, **renamed: str) -> Callable[..., Any]:
    """Call `function` with some of an overload's arguments, by name; `new=old` renames one."""

    def call(bound: dict[str, Any]) -> Any:
        chosen = {name: bound[name] for name in names if name in bound}
        chosen.update({new: bound[old] for new, old in renamed.items() if old in bound})
        return function(**chosen)

    return call


def _slice(self: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    if isinstance(end, int) and end == _END:
        end = None
    zero = isinstance(start, int) and start == 0
    cut = slice(None if zero else start, end, step if step != 1 else None)
    return self[(slice(None),) * (dim % self.dim()) + (cut,)]


# How ATen writes "to the end".
_END: Final = 9223372036854775807
_NORM: Final = (
    "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps",
)  # fmt: skip
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
    "aten::copy": lambda bound: bound["src"].to(bound["self"].dtype).expand(bound["self"].shape),
}
