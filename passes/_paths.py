"""Module paths and scopes for what a pass adds beside a node: quantizers, masks."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import fx

__all__ = ["free_path", "path_beside", "scope_beside"]


def path_beside(node_id: str, suffix: str) -> str:
    """Return where a module that belongs to a node goes: beside the node's own module.

    With `_fq`: `layer1.0.conv1` -> `layer1.0.conv1_fq`; a number cannot be an attribute in Python
    source, so `stem.0` -> `stem_0_fq`; `layer1.0/relu@2` -> `layer1.0.relu_2_fq`; `/add` ->
    `add_fq`.
    """
    scope, slash, op = node_id.rpartition("/")
    if slash:
        parents, name = scope.split(".") if scope else [], re.sub(r"\W+", "_", op)
    else:
        *parents, name = re.sub(r"[^\w.]+", "_", node_id).split(".")
    while parents and name[0].isdigit():
        name = f"{parents.pop()}_{name}"
    return ".".join([*parents, name + suffix])


def free_path(path: str, taken: Collection[str]) -> str:
    """Return `path`, or the first of `path_2`, `path_3`, … that is not taken."""
    candidate, count = path, 1
    while candidate in taken:
        count += 1
        candidate = f"{path}_{count}"
    return candidate


def scope_beside(node: fx.Node) -> tuple[tuple[str, str], ...]:
    """Return the scope that a node stands in; for a module call that of its caller."""
    scope = tuple(node.meta.get("scope", ()))
    return scope[:-1] if scope and scope[-1][0] == node.target else scope
