"""What can be read of a Program while it is rewritten."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import NoReturn

import torch
from torch import fx, nn

from fxcompress.errors import PassError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import op_name
from fxcompress.ir.program import Program
from fxcompress.rewrite._modules import ModuleTree

__all__ = ["Reader", "tie_groups"]


class Reader:
    """A copy of a Program under change, read by ids and names.

    Attributes:
        before: The Program given.
        tree: The copy's modules and tensors.
        origin: Node of the copy -> node of the Program given; new nodes have none.
        device: Where the Program's tensors are, meta included.
    """

    def __init__(self, program: Program) -> None:
        self.before = program
        self._program = program.copy()
        self.tree = ModuleTree(self._program.module)
        pairs = list(zip(program.nodes, self._program.nodes, strict=True))
        ids = node_ids(program)
        self.origin = {new: old for old, new in pairs}
        self._ids = {new: ids[old] for old, new in pairs}
        self._by_id = {name: node for node, name in self._ids.items()}
        self._groups = tie_groups(program.ties)
        self.device = next((t.device for t in program.state().values()), torch.device("cpu"))

    @property
    def program(self) -> Program:
        """The Program as it is now: read it, for instance to compute a cost."""
        return self._program

    @property
    def module(self) -> fx.GraphModule:
        """The module of the Program as it is now."""
        return self._program.module

    @property
    def graph(self) -> fx.Graph:
        """The graph of the Program as it is now."""
        return self._program.graph

    def id(self, node: fx.Node) -> str:
        """Return the node's id in the Program given; a new node gets a provisional one."""
        known = self._ids.get(node)
        if known is not None:
            return known
        if node.op == "call_module":
            return str(node.target)
        scope = node.meta.get("scope", ())
        return f"{scope[-1][0] if scope else ''}/{op_name(node)}"

    def node(self, node_id: str) -> fx.Node:
        """Return the node that has this id in the Program given.

        Raises:
            PassError: There is none, or it was removed.
        """
        found = self._by_id.get(node_id)
        if found is None:
            close = difflib.get_close_matches(node_id, self._by_id, n=3)
            self._fail(
                f"there is no node {node_id}",
                hint=f"close ids: {', '.join(close)}" if close else "",
            )
        if found._erased:
            self._fail(f"node {node_id} was removed earlier in this rewrite")
        return found

    def users_of_module(self, path: str) -> tuple[fx.Node, ...]:
        """Return the calls of a module in graph order; more than one where it is reused."""
        return tuple(self.graph.find_nodes(op="call_module", target=path))

    def get_module(self, path: str) -> nn.Module:
        """Return a module, to read.

        Raises:
            PassError: There is none of that name.
        """
        module = self.tree.find(path)
        if module is None:
            self._fail(f"there is no module {path}")
        return module

    def get_tensor(self, name: str) -> torch.Tensor:
        """Return a parameter or buffer as a plain tensor, to read: never write it in place.

        Raises:
            PassError: There is none of that name.
        """
        tensor = self.tree.tensor(name)
        if tensor is None:
            self._fail(f"there is no parameter or buffer {name}")
        return tensor.detach()

    def tied(self, name: str) -> tuple[str, ...]:
        """Return every name of the tensor `name`, itself included."""
        return self._groups.get(name, (name,))

    def ties(self) -> set[tuple[str, ...]]:
        """Return the names of every tensor that has several."""
        return set(self._groups.values())

    def fresh_path(self, path: str) -> str:
        """Return `path`, or the first of `path_2`, `path_3`, … that is not taken."""
        candidate, count = path, 1
        while self.tree.find(candidate) is not None or self.tree.tensor(candidate) is not None:
            count += 1
            candidate = f"{path}_{count}"
        return candidate

    def _fail(
        self, what: str, *, reason: str = "", hint: str = "", where: str | None = None
    ) -> NoReturn:
        raise PassError(what, reason=reason, hint=hint, where=where)


def tie_groups(ties: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Return name -> every name of its tensor, the canonical one first."""
    groups: dict[str, list[str]] = {}
    for alias, canonical in ties.items():
        groups.setdefault(canonical, [canonical]).append(alias)
    return {name: tuple(group) for group in groups.values() for name in group}
