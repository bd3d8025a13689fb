"""Which node holds the value of which tensor, through views and in-place changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

__all__ = ["Entry", "Values", "same_storage"]


@dataclass
class Entry:
    """A tensor object seen while recording.

    Attributes:
        tensor: The object; held so that its `id` stays its own.
        node: The node that computes its value, as of `version`.
        parent: The entry it is a view of, if it is one.
        again: Writes the view's node again, from a node of the parent.
        scatter: Writes the parent's new value from (parent's node, new value of the view);
            None where no such op is known.
    """

    tensor: torch.Tensor
    node: fx.Node
    parent: Entry | None = None
    again: Callable[[fx.Node], fx.Node] | None = None
    scatter: Callable[[fx.Node, fx.Node], fx.Node] | None = None
    version: int = 0

    @property
    def root(self) -> Entry:
        """The entry that owns the memory."""
        entry = self
        while entry.parent is not None:
            entry = entry.parent
        return entry


class Values:
    """Tensor object -> entry, by identity."""

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}

    def find(self, tensor: torch.Tensor) -> Entry | None:
        """Return the entry of a tensor object, or None."""
        return self._entries.get(id(tensor))

    def define(
        self,
        tensor: torch.Tensor,
        node: fx.Node,
        parent: Entry | None = None,
        again: Callable[[fx.Node], fx.Node] | None = None,
        scatter: Callable[[fx.Node, fx.Node], fx.Node] | None = None,
    ) -> Entry:
        """Say that `node` computes `tensor`."""
        entry = Entry(tensor, node, parent, again, scatter)
        entry.version = entry.root.version
        self._entries[id(tensor)] = entry
        return entry

    def read(self, entry: Entry) -> fx.Node:
        """Return the node of an entry's present value, written again if its memory changed."""
        if entry.parent is None:
            return entry.node
        now = entry.root.version
        if entry.version != now and entry.again is not None:
            entry.node = entry.again(self.read(entry.parent))
            entry.version = now
        return entry.node

    def change(self, entry: Entry, node: fx.Node) -> bool:
        """Say that an in-place op gave `entry` the value of `node`.

        Returns whether everything that shares its memory could be told.
        """
        chain = [entry]
        while chain[-1].parent is not None:
            chain.append(chain[-1].parent)
        parents = [self.read(link) for link in chain[1:]]
        value: fx.Node = node
        entry.node = node
        for child, parent, old in zip(chain, chain[1:], parents, strict=False):
            if child.scatter is None:
                return False
            value = child.scatter(old, value)
            parent.node = value
        chain[-1].version += 1
        for link in chain:
            link.version = chain[-1].version
        return True


def same_storage(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors share memory."""
    try:
        return bool(left.untyped_storage()._cdata == right.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return False
