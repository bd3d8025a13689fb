"""Wrap long statements the way formatters do, so that the emitted source needs none."""

from __future__ import annotations

import itertools
import re
from typing import Final

__all__ = ["WIDTH", "space_slices", "wrap"]

WIDTH: Final = 88
_LOOSEST_FIRST: Final = (
    ("==", "!=", "<", "<=", ">", ">="), ("|",), ("^",), ("&",), ("+", "-"), ("*", "/", "//", "@"),
)  # fmt: skip
_NAMES: Final = re.compile(r"\w+(, \w+)*")
_OPEN, _CLOSE = "([{", ")]}"


def wrap(line: str, indent: int, width: int = WIDTH) -> list[str]:
    """Return a statement as lines of at most `width` columns, where its brackets allow it.

    The contents of the last bracket that is not nested go to a line of their own; if that is too
    long, each element gets one, with a trailing comma.
    """
    pad = " " * indent
    if len(pad) + len(line) <= width:
        return [pad + line]
    parted = _parted(line, indent, width)
    if parted is not None:
        return parted
    span = _last_bracket(line, width - indent)
    if span is None:
        return [pad + line]
    start, end = span
    head, inside, tail = line[: start + 1], line[start + 1 : end], line[end:]
    if not inside.strip():
        return [pad + line]
    elements = _elements(inside)
    one = len(elements) == 1
    trailing = inside.rstrip().endswith(",") if one else _takes_comma(line, start)
    if len(pad) + 4 + len(inside) <= width and not inside.endswith(","):
        return [pad + head, f"{pad}    {inside}", *wrap(tail, indent, width)]
    lines = [pad + head]
    for index, element in enumerate(elements):
        comma = "," if index + 1 < len(elements) or trailing else ""
        lines.extend(wrap(element + comma, indent + 4, width))
    return [*lines, *wrap(tail, indent, width)]


def space_slices(line: str) -> str:
    """Put spaces around the colon of a slice whose bounds are more than names and numbers."""
    for start, end in reversed(_brackets(line, nested=True)):
        if (
            line[start] != "["
            or not start
            or not (line[start - 1].isalnum() or line[start - 1] in "_)]")
        ):
            continue
        parts = [_space_slice(element) for element in _elements(line[start + 1 : end])]
        line = f"{line[: start + 1]}{', '.join(parts)}{line[end:]}"
    return line


def _space_slice(element: str) -> str:
    bounds = element.split(":")
    if len(bounds) < 2 or any(c in element for c in "([{\"'") or "." not in element:
        return element
    return " : ".join(bound.strip() for bound in bounds).strip()


def _parted(line: str, indent: int, width: int) -> list[str] | None:
    """Return an assignment or a return with a sum on its right in parentheses, term by term."""
    head, sign, expression = line.partition(" = ")
    if not sign or not _NAMES.fullmatch(head):
        head, sign, expression = "return", " ", line.removeprefix("return ")
        if expression == line:
            return None
    terms = _terms(expression)
    ends_open = expression[-1] in _CLOSE and len(terms) == 2
    if len(terms) < 2 or ends_open:
        return None
    pad = " " * indent
    if len(pad) + 4 + len(expression) <= width:
        inner = [f"{pad}    {expression}"]
    else:
        inner = [part for term in terms for part in wrap(term, indent + 4, width)]
    return [f"{pad}{head}{sign}(", *inner, f"{pad})"]


def _terms(expression: str) -> list[str]:
    """Split before the loosest operators that are in no bracket."""
    for operators in _LOOSEST_FIRST:
        cuts = [
            index
            for index in _outside(expression)
            if any(expression.startswith(f" {operator} ", index) for operator in operators)
        ]
        if cuts:
            edges = [0, *(cut + 1 for cut in cuts), len(expression)]
            return [expression[a:b].strip() for a, b in itertools.pairwise(edges)]
    return [expression]


def _outside(text: str) -> list[int]:
    inside = {i for start, end in _brackets(text) for i in range(start, end + 1)}
    return [index for index in range(len(text)) if index not in inside]


def _last_bracket(line: str, room: int) -> tuple[int, int] | None:
    """Return the bracket to break at: the last one at depth 0 that holds something."""
    best: tuple[int, int] | None = None
    for start, end in _brackets(line):
        fits = start + 1 <= room
        if end - start > 1 and fits:
            best = (start, end)
    return best


def _brackets(line: str, *, nested: bool = False) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    stack: list[int] = []
    quote = ""
    for index, char in enumerate(line):
        if quote:
            quote = "" if char == quote and line[index - 1] != "\\" else quote
        elif char in "\"'":
            quote = char
        elif char in _OPEN:
            stack.append(index)
        elif char in _CLOSE:
            start = stack.pop() if stack else index
            if not stack or nested:
                found.append((start, index))
    return found


def _elements(inside: str) -> list[str]:
    """Split at commas that are in no bracket and no string."""
    found, depth, quote, start = [], 0, "", 0
    for index, char in enumerate(inside):
        if quote:
            quote = "" if char == quote and inside[index - 1] != "\\" else quote
        elif char in "\"'":
            quote = char
        elif char in _OPEN:
            depth += 1
        elif char in _CLOSE:
            depth -= 1
        elif char == "," and depth == 0:
            found.append(inside[start:index].strip())
            start = index + 1
    rest = inside[start:].strip()
    return [*found, rest] if rest else found


def _takes_comma(line: str, start: int) -> bool:
    """Whether a trailing comma changes nothing: in a subscript it might."""
    return not _is_subscript(line, start)


def _is_subscript(line: str, start: int) -> bool:
    return (
        line[start] == "[" and start > 0 and (line[start - 1].isalnum() or line[start - 1] in "_)]")
    )
