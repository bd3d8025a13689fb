"""Wrap long statements the way formatters do, so that the emitted source needs none."""

from __future__ import annotations

from typing import Final

__all__ = ["WIDTH", "wrap"]

WIDTH: Final = 88
_OPEN, _CLOSE = "([{", ")]}"


def wrap(line: str, indent: int, width: int = WIDTH) -> list[str]:
    """Return a statement as lines of at most `width` columns, where its brackets allow it.

    The contents of the last bracket that is not nested go to a line of their own; if that is too
    long, each element gets one, with a trailing comma.
    """
    pad = " " * indent
    if len(pad) + len(line) <= width:
        return [pad + line]
    span = _last_bracket(line, width - indent)
    if span is None:
        return [pad + line]
    start, end = span
    head, inside, tail = line[: start + 1], line[start + 1 : end], line[end:]
    if not inside.strip():
        return [pad + line]
    elements = _elements(inside)
    trailing = _takes_comma(line, start, elements)
    if len(pad) + 4 + len(inside) <= width and not inside.endswith(","):
        return [pad + head, f"{pad}    {inside}", *wrap(tail, indent, width)]
    lines = [pad + head]
    for index, element in enumerate(elements):
        comma = "," if index + 1 < len(elements) or trailing else ""
        lines.extend(wrap(element + comma, indent + 4, width))
    return [*lines, *wrap(tail, indent, width)]


def _last_bracket(line: str, room: int) -> tuple[int, int] | None:
    """Return the bracket to break at: the last one at depth 0 that holds something."""
    best: tuple[int, int] | None = None
    for start, end in _brackets(line):
        fits = start + 1 <= room
        if end - start > 1 and fits:
            best = (start, end)
    return best


def _brackets(line: str) -> list[tuple[int, int]]:
    found, stack, quote = [], [], ""
    for index, char in enumerate(line):
        if quote:
            quote = "" if char == quote and line[index - 1] != "\\" else quote
        elif char in "\"'":
            quote = char
        elif char in _OPEN:
            stack.append(index)
        elif char in _CLOSE:
            start = stack.pop() if stack else index
            if not stack:
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


def _takes_comma(line: str, start: int, elements: list[str]) -> bool:
    """Whether a trailing comma changes nothing: not in a subscript, a generator or an unpacking."""
    if line[start] == "[" and start and (line[start - 1].isalnum() or line[start - 1] in "_)]"):
        return False
    if len(elements) == 1 and (" for " in elements[0] or line[start] == "("):
        call = start > 0 and (line[start - 1].isalnum() or line[start - 1] in "_)]")
        return call and " for " not in elements[0]
    return True
