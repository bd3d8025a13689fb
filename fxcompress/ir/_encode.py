"""Arguments, types and trees as JSON, and back."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxcompress.errors import ModelError

__all__ = ["decode", "dtype_from", "encode", "read_tree", "write_tree"]


def encode(value: Any, index: Mapping[fx.Node, int] | None = None) -> Any:
    """Return a value as JSON: plain where JSON has it, else one `{"tag": …}`.

    Args:
        value: A node, a literal, or a sequence or mapping of them.
        index: Number of each node.

    Raises:
        ModelError: The value is something else.
    """
    if isinstance(value, fx.Node):
        assert index is not None, "only a graph's arguments hold nodes"
        return {"node": index[value]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list):
        return [encode(item, index) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(item, index) for item in value]}
    if isinstance(value, Mapping):
        return {"dict": [[encode(k, index), encode(v, index)] for k, v in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode(v, index) for v in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    for kind, tag in _TORCH_TAGS:
        if isinstance(value, kind):
            return {tag: str(value).removeprefix("torch.")}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    raise ModelError(
        f"a value of type {type(value).__name__} cannot be saved",
        reason="a saved program holds numbers, strings, dtypes and sequences of them",
    )


_TORCH_TAGS: Final = (
    (torch.dtype, "dtype"),
    (torch.device, "device"),
    (torch.memory_format, "memory_format"),
    (torch.layout, "layout"),
)


def decode(value: Any, nodes: Callable[[int], Any]) -> Any:
    """Return what `encode` was given; `nodes` gives a node by its number.

    Raises:
        ModelError: A tag is unknown.
    """
    if isinstance(value, list):
        return [decode(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, inside),) = value.items()
    match tag:
        case "node":
            return nodes(inside)
        case "tuple":
            return tuple(decode(item, nodes) for item in inside)
        case "dict":
            return {decode(k, nodes): decode(v, nodes) for k, v in inside}
        case "slice":
            return slice(*(decode(v, nodes) for v in inside))
        case "ellipsis":
            return Ellipsis
        case "float":
            return float(inside)
        case "complex":
            return complex(*inside)
        case "device":
            return torch.device(inside)
        case "dtype":
            return dtype_from(inside)
        case "memory_format" | "layout":
            found = getattr(torch, inside, None)
            if isinstance(found, (torch.memory_format, torch.layout)):
                return found
    raise ModelError(f"the saved program holds a value of the unknown kind {tag!r}")


def dtype_from(name: str) -> torch.dtype:
    """Return the dtype of that name.

    Raises:
        ModelError: This torch has none.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ModelError(f"this torch has no dtype {name!r}")
    return found


def write_tree(tree: pytree.TreeSpec, what: str) -> Any:
    """Return a pytree as JSON.

    Raises:
        ModelError: It holds a class that has no serialised name.
    """
    try:
        return json.loads(pytree.treespec_dumps(tree))
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ModelError(
            f"the structure of {what} cannot be saved",
            reason=str(error).splitlines()[0],
            hint="return a tuple, a dict or a dataclass",
        ) from error


def read_tree(document: Any) -> pytree.TreeSpec:
    """Return a pytree from JSON; a class that is no pytree here becomes a dict of its fields."""
    known = json.loads(json.dumps(document))
    _replace_unknown(known[1])
    return pytree.treespec_loads(json.dumps(known))


def _replace_unknown(spec: dict[str, Any]) -> None:
    kind = spec["type"]
    if kind is not None and not _is_known(kind):
        spec["type"] = "builtins.dict"
    for child in spec["children_spec"]:
        _replace_unknown(child)


def _is_known(kind: str) -> bool:
    if kind in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
        return True
    module = kind.rpartition(".")[0]
    if module.split(".")[0] == "transformers":
        # Its output classes register themselves; the file may name them before they are loaded.
        try:
            importlib.import_module(module)
        except ImportError:
            return False
        return kind in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE
    return False
