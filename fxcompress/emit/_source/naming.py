"""Names for variables: short where a name says nothing, the field's where one exists."""

from __future__ import annotations

import keyword
import re
from collections.abc import Collection
from typing import Final

import torch
from torch import fx

from fxcompress.ir.ops import op_name

__all__ = ["camel", "distant_meaning", "fresh", "identifier", "input_hint", "meaning", "role"]

_ROLES: Final = {
    "q": "query", "k": "key", "v": "value", "query": "query", "key": "key", "value": "value",
    "q_proj": "query", "k_proj": "key", "v_proj": "value", "q_lin": "query", "k_lin": "key",
    "v_lin": "value", "to_q": "query", "to_k": "key", "to_v": "value", "qkv": "qkv",
    "c_attn": "qkv", "query_key_value": "qkv", "in_proj": "projected", "gate_proj": "gate",
    "up_proj": "up", "downsample": "shortcut", "shortcut": "shortcut", "rotary_emb": "rotary",
}  # fmt: skip
_RESULTS: Final = {
    "sdpa": "attention", "softmax": "weights", "cos": "cos", "sin": "sin", "arange": "positions",
    "embedding": "embedded", "matmul": "product", "bmm": "product",
}  # fmt: skip
_FOLLOWED: Final = 4
_CARRIES: Final = frozenset({"mul", "add", "to", "unsqueeze", "getitem", "expand", "reshape"})
_GENERIC: Final = ("x", "y", "z", "u", "v", "w")
_RESERVED: Final = frozenset({"self", "torch", "nn", "F", "math", "operator", "Tensor"})


def identifier(text: str) -> str:
    """Return a Python name close to `text`."""
    name = re.sub(r"\W+", "_", text).strip("_") or "value"
    name = f"_{name}" if name[0].isdigit() else name
    return f"{name}_" if keyword.iskeyword(name) or name in _RESERVED else name


def camel(text: str) -> str:
    """Return a class name: `attention_block` -> `AttentionBlock`."""
    parts = [part for part in re.split(r"\W|_", text) if part]
    name = "".join(part[0].upper() + part[1:] for part in parts) or "Module"
    return f"Module{name}" if name[0].isdigit() else name


def meaning(node: fx.Node) -> str | None:
    """Return what the field calls the result of a node, or None where it has no name for it."""
    found = role(str(node.target)) if node.op == "call_module" else None
    return found or _RESULTS.get(op_name(node)) or ("mask" if _is_mask(node) else None)


def distant_meaning(node: fx.Node) -> str | None:
    """Return the meaning of a node that is scaled, shifted or reshaped on the way."""
    for _ in range(_FOLLOWED):
        found = meaning(node)
        if found is not None:
            return found
        tensors = [n for n in node.all_input_nodes if _tensor(n) is not None]
        if len(tensors) != 1 or op_name(node) not in _CARRIES:
            return None
        node = tensors[0]
    return None


def _tensor(node: fx.Node) -> torch.Tensor | None:
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def _is_mask(node: fx.Node) -> bool:
    value = _tensor(node)
    return value is not None and value.dtype is torch.bool


def role(path: str) -> str | None:
    """Return what the field calls the result of the module at a path, or None."""
    return _ROLES.get(path.rpartition(".")[2])


def fresh(hint: str | None, taken: Collection[str]) -> str:
    """Return a name that is not taken: the hint, or the next short one."""
    if hint is not None:
        return _numbered(hint, taken)
    free = next((name for name in _GENERIC if name not in taken), None)
    return free or _numbered("t", taken)


def _numbered(base: str, taken: Collection[str]) -> str:
    name, count = base, 1
    while name in taken:
        count += 1
        name = f"{base}{count}"
    return name


def input_hint(node: fx.Node, first: bool) -> str | None:
    """Return a name for a value that a method is given, or None for a short one."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        if first and value.is_floating_point() and node.op != "get_attr":
            return "x"
        if node.op == "placeholder":
            return identifier(str(node.target))
        if node.op == "get_attr":
            return identifier(str(node.target).rpartition(".")[2])
        return distant_meaning(node)
    if isinstance(value, (int, torch.SymInt)):
        return "size"
    return "values"
