"""Make dataclasses and plain objects that hold tensors into pytrees, so they can be taken apart."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.utils import _pytree as pytree

__all__ = ["register_trees"]

_PLAIN = (
    torch.Tensor,
    torch.SymInt,
    torch.SymFloat,
    torch.SymBool,
    str,
    bytes,
    int,
    float,
    complex,
)


def register_trees(value: Any) -> None:
    """Register the classes of every tensor-holding object in `value` that is no pytree yet.

    Dataclasses (Hugging Face's `ModelOutput` is one) and plain objects with attributes (caches)
    are taken apart by attribute.
    """
    for leaf in pytree.tree_leaves(value):
        if leaf is None or isinstance(leaf, _PLAIN) or not _holds_tensors(leaf, set()):
            continue
        # Two leaves may be of one class; the first has registered it.
        if type(leaf) not in pytree.SUPPORTED_NODES:
            _register(type(leaf))
        register_trees(leaf)


def _holds_tensors(value: Any, seen: set[int]) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    if id(value) in seen or isinstance(value, (*_PLAIN, type, torch.nn.Module)):
        return False
    seen.add(id(value))
    if isinstance(value, dict):
        return any(_holds_tensors(v, seen) for v in value.values())
    if isinstance(value, (list, tuple, set)):
        return any(_holds_tensors(v, seen) for v in value)
    return any(_holds_tensors(v, seen) for v in getattr(value, "__dict__", {}).values())


def _register(cls: type) -> None:
    def flatten(value: Any) -> tuple[list[Any], Any]:
        fields = _fields(value)
        return list(fields.values()), list(fields)

    def flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], Any]:
        fields = _fields(value)
        pairs: list[tuple[Any, Any]] = [(pytree.GetAttrKey(k), v) for k, v in fields.items()]
        return pairs, list(fields)

    def unflatten(values: Any, names: Any) -> Any:
        rebuilt: Any = object.__new__(cls)
        for name, value in zip(names, values, strict=True):
            object.__setattr__(rebuilt, name, value)
        return rebuilt

    pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        flatten_with_keys_fn=flatten_with_keys,
    )


def _fields(value: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return dict(vars(value))
