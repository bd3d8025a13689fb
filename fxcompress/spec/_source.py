"""A parsed document in which every key and value knows the file, line and column it came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from fxcompress.errors import Problem

__all__ = ["Key", "Map", "Node", "Origin", "Scalar", "Seq", "Text", "descend", "from_plain"]

Key: TypeAlias = tuple[str | int, ...]
"""The path to a value: names of keys and indices of list items."""


@dataclass(frozen=True)
class Text:
    """A source file: what to call it, and its lines for excerpts."""

    name: str
    lines: Sequence[str] = ()


@dataclass(frozen=True)
class Origin:
    """Where a key or a value was written; lines and columns count from 1, 0 means unknown."""

    text: Text
    line: int = 0
    column: int = 0
    width: int = 1

    def __str__(self) -> str:
        return f"{self.text.name}:{self.line}" if self.line else self.text.name

    def problem(self, message: str, *, key: Key = (), hint: str = "") -> Problem:
        """Return a Problem at this place, with the source line and a caret."""
        return Problem(
            message,
            file=self.text.name,
            line=self.line,
            column=self.column,
            key=dotted(key),
            hint=hint,
            excerpt=self.excerpt(),
        )

    def excerpt(self, window: int = 96) -> str:
        """Return the source line with a caret below, cut to `window` characters around it."""
        if not 1 <= self.line <= len(self.text.lines):
            return ""
        line = self.text.lines[self.line - 1].rstrip().replace("\t", " ")
        start = max(0, self.column - 1 - window // 2) if len(line) > window else 0
        shown = line[start : start + window]
        at = self.column - 1 - start
        carets = "^" * max(1, min(self.width, len(shown) - at))
        margin = f"{self.line:>5} | "
        return f"{margin}{shown}\n{' ' * (len(margin) - 2)}| {' ' * at}{carets}"


@dataclass(frozen=True)
class Scalar:
    """A string, number, bool or null."""

    value: str | int | float | bool | None
    origin: Origin

    def plain(self) -> Any:
        """Return the Python value."""
        return self.value


@dataclass(frozen=True)
class Seq:
    """A list."""

    items: list[Node]
    origin: Origin

    def plain(self) -> Any:
        """Return a list of plain values."""
        return [item.plain() for item in self.items]


@dataclass(frozen=True)
class Map:
    """A mapping from strings; `keys` holds the origin of each key."""

    items: dict[str, Node]
    origin: Origin
    keys: dict[str, Origin] = field(default_factory=dict)

    def plain(self) -> Any:
        """Return a dict of plain values."""
        return {key: item.plain() for key, item in self.items.items()}

    def key_origin(self, key: str) -> Origin:
        """Return where a key was written, or where the mapping starts."""
        return self.keys.get(key, self.origin)


Node: TypeAlias = Scalar | Seq | Map


def dotted(key: Key) -> str:
    """Return a key path as people write it: `passes[1].budget.macs`."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def descend(node: Node, key: Key) -> Iterator[tuple[str | int, Node]]:
    """Yield each step of `key` that exists below `node`, and stop at the first that does not."""
    for part in key:
        child: Node | None = None
        if isinstance(node, Map):
            child = node.items.get(str(part))
        elif isinstance(node, Seq) and isinstance(part, int) and 0 <= part < len(node.items):
            child = node.items[part]
        if child is None:
            return
        node = child
        yield part, child


def from_plain(value: Any, origin: Origin) -> Node:
    """Return a tree of plain values that all come from one place.

    Raises:
        TypeError: A value is not a string, number, bool, None, list, tuple or mapping.
    """
    if value is None or isinstance(value, str | int | float):
        return Scalar(value, origin)
    if isinstance(value, Mapping):
        items = {str(key): from_plain(item, origin) for key, item in value.items()}
        return Map(items, origin)
    if isinstance(value, list | tuple):
        return Seq([from_plain(item, origin) for item in value], origin)
    raise TypeError(f"a spec holds no {type(value).__name__}")
