"""Functions and methods by name: the only ones that a saved Program may call."""

from __future__ import annotations

import builtins
import importlib
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F

from fxcompress.errors import ModelError
from fxcompress.ir.ops import op_of, qualified_name

__all__ = ["check_method", "resolve_function", "write_function"]

# torch and operator also hold what loads files and calls anything (torch.load, operator.call):
# there only ops count. The others hold nothing but functions of tensors and numbers.
_OPS_ONLY: Final[Mapping[str, Any]] = {"torch": torch, "operator": operator}
_WHOLE: Final[Mapping[str, Any]] = {
    "torch.nn.functional": F,
    "torch.fft": torch.fft,
    "torch.linalg": torch.linalg,
    "torch.special": torch.special,
    "torch._C._nn": torch._C._nn,
    "math": math,
}
_BUILTINS: Final = frozenset({"abs", "bool", "float", "int", "len", "max", "min", "pow", "round"})
# Namespace of torch.ops -> the module whose import declares its operators.
_OPERATORS: Final = {
    "aten": "torch",
    "prims": "torch",
    "torchvision": "torchvision",
    "transformers": "transformers.integrations.moe",
}


def write_function(target: Callable[..., Any]) -> str:
    """Return the name under which `resolve_function` finds `target`.

    Raises:
        ModelError: It is no function of torch, operator, math or fxcompress.nn.
    """
    name = qualified_name(target)
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        name = f"torch.ops.{name}"
    if (target.__module__ or "").startswith("fxcompress.nn"):
        name = f"fxcompress.nn.{target.__name__}"
    if resolve_function(name) is not target:
        raise ModelError(
            f"the function {name} cannot be saved",
            reason="a saved program calls only functions of torch, operator, math and "
            "fxcompress.nn, by name",
        )
    return name


def resolve_function(name: str) -> Callable[..., Any]:
    """Return the function of that name.

    Raises:
        ModelError: There is none, or a saved program must not call it.
    """
    space, _, leaf = name.rpartition(".")
    found: Any = None
    if name.startswith("torch.ops."):
        found = _operator(name.split(".")[2:])
    elif space in _WHOLE and not leaf.startswith("__"):
        found = getattr(_WHOLE[space], leaf, None)
    elif space in _OPS_ONLY:
        found = getattr(_OPS_ONLY[space], leaf, None)
        if not (callable(found) and _is_op(leaf, found)):
            found = None
    elif space == "builtins" and leaf in _BUILTINS:
        found = getattr(builtins, leaf)
    elif space == "fxcompress.nn" and not leaf.startswith("_"):
        found = getattr(importlib.import_module("fxcompress.nn"), leaf, None)
    if not callable(found):
        raise ModelError(
            f"a saved program must not call {name!r}",
            reason="it is no function of torch, operator, math or fxcompress.nn",
        )
    return found  # type: ignore[no-any-return]


def _is_op(name: str, function: Callable[..., Any]) -> bool:
    return op_of(function) is not None or _is_native(name)


def _is_native(name: str) -> bool:
    # Any Python object answers to `__reduce__` and the like.
    return not name.startswith("_") and hasattr(torch._C._VariableFunctions, name)


def _operator(path: list[str]) -> Any:
    """Return the operator, or its overload, that `torch.ops` holds under a path."""
    if len(path) not in (2, 3) or path[0] not in _OPERATORS:
        return None
    try:
        importlib.import_module(_OPERATORS[path[0]])
    except ImportError as error:
        raise ModelError(
            f"the saved program calls an operator of {path[0]}, which is not installed",
            reason=str(error),
            hint=f"install {path[0]}",
        ) from error
    found: Any = torch.ops
    for part in path:
        found = getattr(found, part, None)
    known = isinstance(found, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))
    return found if known else None


def check_method(name: str) -> str:
    """Return `name` if it is a tensor method that computes.

    Raises:
        ModelError: It is something else.
    """
    if op_of(name) is None and not _is_native(name):
        raise ModelError(
            f"a saved program must not call the method {name!r}",
            reason="it is no op on tensors",
        )
    return name
