"""The entries of a diff, and how they group by module."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal

from fxcompress.ir.text import NodeLine, OutputLine, StateLine, Text

__all__ = [
    "OUTPUT_TOLERANCE",
    "STATE_TOLERANCE",
    "GraphDiff",
    "Group",
    "NodeChange",
    "OutputChange",
    "StateChange",
    "Verdict",
    "group_of",
    "group_of_tensor",
]

STATE_TOLERANCE: Final = 1e-5
OUTPUT_TOLERANCE: Final = 1e-3


class Verdict(Enum):
    """What kind of difference there is; the worst one decides."""

    IDENTICAL = "identical"
    NAMES = "names only"
    NUMBERS = "numbers only"
    STRUCTURE = "STRUCTURE changed"


@dataclass(frozen=True)
class NodeChange:
    """A node that was added, removed, changed, or only moved in the order of the graph.

    `before` and `after` are the lines right of the id, with op, operands, attributes and type.
    """

    kind: Literal["add", "remove", "change", "move"]
    id: str
    before: NodeLine | None
    after: NodeLine | None

    @property
    def fields(self) -> tuple[str, ...]:
        """Which parts of a changed node differ: op, operands, attributes, type."""
        if self.before is None or self.after is None:
            return ()
        names = ("op", "operands", "attributes", "type")
        return tuple(n for n in names if getattr(self.before, n) != getattr(self.after, n))


@dataclass(frozen=True)
class StateChange:
    """A parameter or buffer that was added, removed, retyped, tied otherwise, or has other values.

    `distance` is the largest difference of a figure, as a part of the larger magnitude.
    """

    kind: Literal["add", "remove", "type", "tie", "numbers"]
    name: str
    before: StateLine | None
    after: StateLine | None
    distance: float = 0.0


@dataclass(frozen=True)
class OutputChange:
    """An output, for fixed inputs, that was added, removed, retyped or has other values."""

    kind: Literal["add", "remove", "type", "numbers"]
    index: int
    before: OutputLine | None
    after: OutputLine | None
    distance: float = 0.0


@dataclass(frozen=True)
class Group:
    """The changes below one module; `nodes` counts the nodes there after the change."""

    path: str
    nodes: int
    changes: tuple[NodeChange | StateChange, ...]

    def count(self, *kinds: str) -> int:
        """Return how many node changes are of these kinds."""
        return sum(isinstance(c, NodeChange) and c.kind in kinds for c in self.changes)


@dataclass(frozen=True)
class GraphDiff:
    """Every difference from one text to another.

    Attributes:
        before: The first text.
        after: The second.
        nodes: Differing nodes, in the order of the graphs.
        state: Differing parameters and buffers, by name.
        outputs: Differing outputs.
        returns: Whether the returned leaves differ.
        verdict: The kind of difference.
    """

    before: Text
    after: Text
    nodes: tuple[NodeChange, ...]
    state: tuple[StateChange, ...]
    outputs: tuple[OutputChange, ...]
    returns: bool
    verdict: Verdict

    def __bool__(self) -> bool:
        return self.verdict is not Verdict.IDENTICAL

    def groups(self) -> tuple[Group, ...]:
        """Return the changes by module, in graph order, unchanged modules included."""
        paths: dict[str, list[NodeChange | StateChange]] = {}
        counts: dict[str, int] = {}
        for line in (*self.after.nodes, *self.before.nodes):
            paths.setdefault(group_of(line), [])
        for line in self.after.nodes:
            counts[group_of(line)] = counts.get(group_of(line), 0) + 1
        for node in self.nodes:
            shown = node.after or node.before
            assert shown is not None, "a change has a line on one side"
            paths[group_of(shown)].append(node)
        for tensor in self.state:
            paths.setdefault(group_of_tensor(tensor.name), []).append(tensor)
        return tuple(Group(p, counts.get(p, 0), tuple(c)) for p, c in paths.items())


def group_of(line: NodeLine) -> str:
    """Return the module that a node is listed under; empty for the root."""
    if "/" in line.id:
        return line.id.split("/", 1)[0]
    path = line.id.split("@", 1)[0]
    if line.op == "input":
        return ""
    if line.op in ("param", "buffer"):
        return group_of_tensor(path)
    return path.rpartition(".")[0] or path


def group_of_tensor(name: str) -> str:
    """Return the module that a tensor is listed under: that of its leaf module's node."""
    module = name.rpartition(".")[0]
    return module.rpartition(".")[0] or module
