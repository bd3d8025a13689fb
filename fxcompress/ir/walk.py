"""Walks over the edges of a graph."""

from __future__ import annotations

from torch import fx

__all__ = ["upstream"]


def upstream(node: fx.Node) -> set[fx.Node]:
    """Return every node that a node is computed from, itself left out."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        for each in stack.pop().all_input_nodes:
            if each not in found:
                found.add(each)
                stack.append(each)
    return found
