"""How a module's children are made, and which of their numbers a constructor is given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fxcompress.emit._source.literals import Literal, literal_text
from fxcompress.emit._source.naming import identifier

__all__ = ["Column", "Container", "New", "Piece", "columns_of", "piece_text"]

_VAGUE: Final = frozenset({"size", "value"})


@dataclass(frozen=True)
class New:
    """The making of one module: class, and arguments as (name, hole, default, is positional)."""

    cls: str
    arguments: tuple[tuple[str, int, Any, bool], ...]


@dataclass(frozen=True)
class Container:
    """The making of a container of torch.nn."""

    kind: str
    names: tuple[str, ...]
    items: tuple[New | Container, ...]


Piece = New | Container


@dataclass
class Column:
    """One literal over all modules of a class: its values, and its name if they differ."""

    values: list[Any]
    name: str | None


def columns_of(group: Sequence[Sequence[Literal]], attributes: Collection[str]) -> list[Column]:
    """Return what the literals of one class are over its modules, with names where they differ.

    Args:
        group: The literals of each module.
        attributes: Names that the class's own attributes have.
    """
    first = group[0]
    columns = [Column([found[i].value for found in group], None) for i in range(len(first))]
    # Literals that vary together are one argument.
    together: dict[tuple[str, ...], list[int]] = {}
    for number, column in enumerate(columns):
        key = tuple(map(repr, column.values))
        if len(set(key)) > 1:
            together.setdefault(key, []).append(number)
    taken = {"self", *attributes}
    hints = Counter(_hint([first[n] for n in numbers]) for numbers in together.values())
    for numbers in together.values():
        hint, owner = _hint([first[n] for n in numbers]), first[numbers[0]].owner
        if hints[hint] > 1:
            hint = identifier(first[numbers[0]].name)
        if owner and not owner.isdigit() and (hints[hint] > 1 or hint in _VAGUE or hint in taken):
            hint = identifier(f"{owner}_{hint}")
        name, count = hint, 1
        while name in taken:
            count += 1
            name = f"{hint}_{count}"
        taken.add(name)
        for number in numbers:
            columns[number].name = name
    return columns


def _hint(literals: Sequence[Literal]) -> str:
    names = {literal.name for literal in literals}
    for kind in ("channels", "features"):
        if {f"in_{kind}", f"out_{kind}"} <= names:
            return kind
    return identifier(literals[0].name)


def piece_text(piece: Piece, columns: Sequence[Column]) -> str:
    """Return the source that makes a module."""
    if isinstance(piece, Container):
        return _container_text(piece, columns)
    parts = []
    for name, number, default, positional in piece.arguments:
        column = columns[number]
        if column.name is None and _is_default(column.values[0], default):
            continue
        value = column.name or literal_text(column.values[0])
        parts.append(value if positional else f"{name}={value}")
    return f"{piece.cls}({', '.join(parts)})"


def _is_default(value: Any, default: Any) -> bool:
    if default is ... or isinstance(value, bool) != isinstance(default, bool):
        return False
    return type(default) in (bool, int, float, str, tuple, type(None)) and bool(value == default)


def _container_text(piece: Container, columns: Sequence[Column]) -> str:
    items = [piece_text(item, columns) for item in piece.items]
    numbered = list(piece.names) == [str(i) for i in range(len(items))]
    repeated = len(items) > 2 and len(set(items)) == 1
    if piece.kind == "sequential" and numbered:
        inner = f"*({items[0]} for _ in range({len(items)}))" if repeated else ", ".join(items)
        return f"nn.Sequential({inner})"
    pairs = zip(piece.names, items, strict=True)
    if piece.kind == "sequential":
        inner = ", ".join(f'("{name}", {item})' for name, item in pairs)
        return f"nn.Sequential(OrderedDict([{inner}]))"
    if piece.kind == "dict":
        inner = ", ".join(f'"{name}": {item}' for name, item in pairs)
        return f"nn.ModuleDict({{{inner}}})"
    if repeated:
        return f"nn.ModuleList({items[0]} for _ in range({len(items)}))"
    return f"nn.ModuleList([{', '.join(items)}])"
