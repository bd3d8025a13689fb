"""Read YAML 1.2 (core schema) into a tree with positions.

The document is built from the parser's events, not by the loader: so nothing recurses without a
limit, no tag can construct an object, an alias bomb is counted before it is built, duplicate keys
are errors, and `no` is a string while `1e-3` is a number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
)

from fxcompress.errors import SpecError
from fxcompress.spec._source import Map, Node, Origin, Scalar, Seq, Text

__all__ = ["MAX_BYTES", "MAX_DEPTH", "MAX_NODES", "parse_text", "read_file", "resolve_scalar"]

MAX_BYTES = 1 << 20
MAX_DEPTH = 40
MAX_NODES = 20_000

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL: dict[str, bool | float | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}
_TAGS = {"str", "int", "float", "bool", "null", "map", "seq"}
_PREFIX = "tag:yaml.org,2002:"


def resolve_scalar(text: str) -> str | int | float | bool | None:
    """Return what an unquoted scalar means in the core schema of YAML 1.2.

    Raises:
        ValueError: It is an integer of thousands of digits.
    """
    if text in _SPECIAL:
        return _SPECIAL[text]
    if _INT.fullmatch(text):
        bare = text.lstrip("+-")
        return int(text, 0) if bare[:2] in ("0o", "0x") else int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def read_file(path: Path, name: str | None = None) -> Node:
    """Read one YAML file.

    Raises:
        SpecError: It is missing, too large, not UTF-8, or not one valid document.
    """
    shown = name or str(path)
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise SpecError(
            "cannot read the spec", where=shown, reason=error.strerror or str(error)
        ) from error
    if len(data) > MAX_BYTES:
        raise SpecError("the spec is too large", where=shown, reason=f"over {MAX_BYTES:,} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        origin = Origin(Text(shown, data.decode("utf-8", "replace").split("\n")), line, 1)
        problem = origin.problem("is not UTF-8", hint="save the file as UTF-8")
        raise SpecError("the spec is not valid YAML", (problem,)) from error
    return parse_text(text, shown)


def parse_text(text: str, name: str) -> Node:
    """Parse one YAML document.

    Raises:
        SpecError: It is empty, invalid, too deep, too large once aliases are expanded, has a
            duplicate or non-scalar key, an unknown tag, or is followed by another document.
    """
    source = Text(name, text.split("\n"))
    yaml = YAML(typ="safe", pure=True)
    try:
        return _Builder(source, yaml.parse(text)).document()
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        origin = _clamp(Origin(source, line, column))
        message = " ".join(filter(None, (error.context, error.problem))) or "cannot be parsed"
        raise _invalid(origin, message, hint=_advice(message)) from error
    except YAMLError as error:  # the reader's: a character that YAML does not allow
        at = max(0, getattr(error, "position", 0) or 0)
        line = text.count("\n", 0, at) + 1
        column = at - (text.rfind("\n", 0, at) + 1) + 1
        code = getattr(error, "character", None)
        what = f"character U+{code:04X} is not allowed" if isinstance(code, int) else str(error)
        raise _invalid(_clamp(Origin(source, line, column)), what) from error
    except SpecError:
        raise
    except Exception as error:  # the parser itself fell over the text, by an assert, say
        raise _invalid(Origin(source, 1, 1), f"cannot be parsed: {error}") from error


def _clamp(origin: Origin) -> Origin:
    """Move a position past the end of the text to its last line."""
    line = min(origin.line, len(origin.text.lines))
    if line == origin.line:
        return origin
    return Origin(origin.text, line, len(origin.text.lines[line - 1]) + 1)


def _advice(message: str) -> str:
    if "'\\t'" in message:
        return "indent with spaces"
    if "cannot start any token" in message or "not allowed here" in message:
        return "quote the value if it is text"
    return ""


def _invalid(origin: Origin, message: str, *, hint: str = "") -> SpecError:
    return SpecError("the spec is not valid YAML", (origin.problem(message, hint=hint),))


class _Builder:
    """Builds the tree of one document from parser events, iteratively over siblings."""

    def __init__(self, source: Text, events: Iterator[Any]) -> None:
        self.source, self.events = source, events
        self.anchors: dict[str, Node] = {}
        self.sizes: dict[int, int] = {}
        self.count = 0

    def document(self) -> Node:
        """Return the only document of the stream."""
        root: Node | None = None
        for event in self.events:
            if isinstance(event, DocumentStartEvent) and root is not None:
                raise _invalid(self.origin(event), "a second document", hint="keep one per file")
            if isinstance(event, NodeEvent):
                root = self.node(event, 0)
        if root is None:
            raise SpecError("the spec is empty", where=self.source.name)
        return root

    def origin(self, event: Any) -> Origin:
        """Return where an event starts; its width reaches to the end of the scalar or line."""
        start, end = event.start_mark, event.end_mark
        width = end.column - start.column if end.line == start.line else 1
        return Origin(self.source, start.line + 1, start.column + 1, max(1, width))

    def node(self, event: Any, depth: int) -> Node:
        """Return the value that starts with `event`."""
        origin = self.origin(event)
        if depth > MAX_DEPTH:
            raise _invalid(origin, f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, AliasEvent):
            if event.anchor not in self.anchors:
                raise _invalid(origin, f"alias *{event.anchor} has no finished anchor before it")
            node = self.anchors[event.anchor]
            self.grow(self.sizes[id(node)], origin)
            return node
        before = self.count
        self.grow(1, origin)
        node = (
            self.collection(event, origin, depth)
            if isinstance(event, CollectionStartEvent)
            else self.scalar(event, origin)
        )
        if event.anchor:
            self.anchors[event.anchor] = node
            self.sizes[id(node)] = self.count - before
        return node

    def grow(self, by: int, origin: Origin) -> None:
        """Count values, those behind aliases again each time, and stop a bomb."""
        self.count += by
        if self.count > MAX_NODES:
            raise _invalid(origin, f"more than {MAX_NODES:,} values once aliases are expanded")

    def collection(self, event: Any, origin: Origin, depth: int) -> Node:
        """Return a list or a mapping; the events up to its end are consumed."""
        self.known_tag(event, origin, {"map"} if isinstance(event, MappingStartEvent) else {"seq"})
        # A caret below a whole flow collection helps less than one at its start.
        origin = Origin(origin.text, origin.line, origin.column)
        if not isinstance(event, MappingStartEvent):
            items = [self.node(inner, depth + 1) for inner in self.until_end()]
            return Seq(items, origin)
        pairs: dict[str, Node] = {}
        keys: dict[str, Origin] = {}
        for inner in self.until_end():
            key, at = self.key(inner)
            if key in pairs:
                raise _invalid(
                    at, f"duplicate key `{key}`", hint=f"first written in line {keys[key].line}"
                )
            keys[key] = at
            pairs[key] = self.node(next(self.events), depth + 1)
        return Map(pairs, origin, keys)

    def until_end(self) -> Iterator[Any]:
        """Yield the events that start a child, until the collection ends."""
        for event in self.events:
            if not isinstance(event, NodeEvent):
                return
            yield event

    def key(self, event: Any) -> tuple[str, Origin]:
        """Return a key as text; `0: batch` has the key `0`."""
        origin = self.origin(event)
        if not isinstance(event, ScalarEvent):
            raise _invalid(origin, "a key must be a plain word", hint="quote it if it is text")
        if event.value == "<<" and event.implicit[0]:
            raise _invalid(origin, "merge keys (`<<`) are not part of YAML 1.2", hint="use extends")
        self.grow(1, origin)
        return self.checked(event.value, origin), origin

    def scalar(self, event: Any, origin: Origin) -> Scalar:
        """Return a string, number, bool or null."""
        tag = self.known_tag(event, origin, {"str", "int", "float", "bool", "null"})
        text = self.checked(event.value, origin)
        if tag == "str" or (tag is None and not event.implicit[0]):
            return Scalar(text, origin)
        try:
            value = resolve_scalar(text)
        except ValueError as error:
            raise _invalid(origin, "a number of too many digits") from error
        kind = "null" if value is None else type(value).__name__
        if tag is not None and tag != kind and not (tag == "float" and kind == "int"):
            raise _invalid(origin, f"`{text}` is no {tag}")
        return Scalar(value, origin)

    def checked(self, text: str, origin: Origin) -> str:
        """Refuse lone surrogates, which no file can hold again."""
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise _invalid(origin, "half a surrogate pair", hint="write the character itself")
        return text

    def known_tag(self, event: Any, origin: Origin, allowed: set[str]) -> str | None:
        """Return the short name of an explicit tag; one that is not of the core schema fails."""
        tag = None if event.tag is None else str(event.tag)
        if tag is None or tag == "!":
            return "str" if tag == "!" and "str" in allowed else None
        short = tag.removeprefix(_PREFIX)
        if short not in allowed & _TAGS:
            raise _invalid(origin, f"tag `{tag}` is not allowed", hint="leave the tag out")
        return short
