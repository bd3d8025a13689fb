"""Text with numbered holes for literals, so that classes which differ in numbers only are one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

__all__ = ["Literal", "Literals", "fill", "holes", "literal_text", "visible_length"]

_HOLE: Final = re.compile("\x01(\\d+)(f?)\x02")
# About how wide a literal is: 64, 0.08838834764831845.
_WIDTHS: Final = {"": 3, "f": 10}


@dataclass(frozen=True)
class Literal:
    """A value in the text of one module: what it is, where it stands, and a name for it."""

    value: Any
    owner: str
    name: str


@dataclass
class Literals:
    """The literals of one module, in the order of the text."""

    found: list[Literal] = field(default_factory=list)

    def hole(self, value: Any, owner: str = "", name: str = "value") -> str:
        """Return the text that stands for a literal until it is filled in."""
        self.found.append(Literal(value, owner, name))
        kind = "f" if isinstance(value, float) else ""
        return f"\x01{len(self.found) - 1}{kind}\x02"

    def mark(self) -> int:
        """Return where the literals end now, for `forget`."""
        return len(self.found)

    def forget(self, mark: int) -> None:
        """Drop the literals of a text that was only tried."""
        del self.found[mark:]


def holes(text: str) -> list[int]:
    """Return the numbers of the holes in a text."""
    return [int(number) for number, _ in _HOLE.findall(text)]


def fill(text: str, values: Sequence[str] | Callable[[int], str]) -> str:
    """Return the text with its holes filled in."""
    of = values if callable(values) else values.__getitem__
    return _HOLE.sub(lambda match: of(int(match[1])), text)


def visible_length(text: str) -> int:
    """Return about how long a text will be; the same for texts that differ in literals only."""
    return len(_HOLE.sub(lambda match: "0" * _WIDTHS[match[2]], text))


def literal_text(value: Any) -> str:
    """Return a plain value as Python source."""
    if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))):
        return f'float("{value}")'
    if isinstance(value, tuple):
        inner = ", ".join(literal_text(item) for item in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, list):
        return f"[{', '.join(literal_text(item) for item in value)}]"
    if isinstance(value, dict):
        inner = ", ".join(f"{literal_text(k)}: {literal_text(v)}" for k, v in value.items())
        return f"{{{inner}}}"
    if isinstance(value, str):
        return '"' + repr(f"'{value}")[2:-1] + '"'
    text = repr(value)
    return text.replace("e+", "e") if isinstance(value, float) else text
