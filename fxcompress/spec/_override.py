"""Overrides from the command line: `passes.shrink.budget.macs=40%`."""

from __future__ import annotations

import re
from collections.abc import Iterator

from fxcompress.errors import Problem, SpecError
from fxcompress.pipeline._close import did_you_mean
from fxcompress.spec._source import Map, Node, Origin, Scalar, Seq, Text
from fxcompress.spec._yaml import parse_text

__all__ = ["apply_override", "split_path", "step_ids"]

_PART = re.compile(r'"([^"]*)"|([^."=]+)')


def step_ids(steps: Node | None) -> list[str]:
    """Return the id of every step: its `id`, or the last part of its `use`, made unique by `_2`.

    Steps that say neither get an id that cannot be addressed, so that places stay in line.
    """
    items = steps.items if isinstance(steps, Seq) else []
    given = {_text(step, "id") for step in items}
    found: list[str] = []
    for index, step in enumerate(items):
        name = _text(step, "id")
        if name is None:
            base = (_text(step, "use") or f"?{index}").rpartition(".")[2]
            name, count = base, 1
            while name in given or name in found:
                count += 1
                name = f"{base}_{count}"
        found.append(name)
    return found


def _text(step: Node, key: str) -> str | None:
    node = step.items.get(key) if isinstance(step, Map) else None
    return node.value if isinstance(node, Scalar) and isinstance(node.value, str) else None


def split_path(path: str) -> list[str] | None:
    """Return the parts of a dotted path; a part in double quotes may hold dots."""
    parts: list[str] = []
    at = 0
    while match := _PART.match(path, at):
        parts.append(match[1] if match[1] is not None else match[2])
        at = match.end()
        if at == len(path):
            return parts
        if path[at] != ".":
            return None
        at += 1
    return None


def apply_override(tree: Map, text: str, problems: list[Problem]) -> Map:
    """Return the tree with one `KEY=VALUE` applied; what is wrong with it goes to `problems`."""
    path, equals, value = text.partition("=")
    source = Text(f"--set {text}", (text,))
    origin = Origin(source, 1, 1, max(1, len(path)))
    parts = split_path(path.strip())
    if not equals or parts is None:
        problems.append(origin.problem("should be KEY=VALUE", hint="e.g. passes.shrink.ratio=0.5"))
        return tree
    try:
        node = _value(value, source, len(path) + 2)
    except SpecError as error:
        problems.extend(error.problems or (origin.problem(error.what),))
        return tree
    try:
        placed = _place(tree, parts, node, origin, ())
    except _NoPlaceError as error:
        problems.append(origin.problem(error.what, hint=error.hint))
        return tree
    return placed if isinstance(placed, Map) else tree


class _NoPlaceError(Exception):
    """An override addresses something that is not there."""

    def __init__(self, what: str, hint: str) -> None:
        self.what, self.hint = what, hint
        super().__init__(what)


def _value(text: str, source: Text, column: int) -> Node:
    """Parse the value as YAML; all of it counts as written at one place."""
    origin = Origin(source, 1, column, max(1, len(text)))
    if not text.strip():
        return Scalar(None, origin)
    return _moved(parse_text(text, source.name), origin)


def _moved(node: Node, origin: Origin) -> Node:
    if isinstance(node, Map):
        items = {key: _moved(item, origin) for key, item in node.items.items()}
        return Map(items, origin, dict.fromkeys(items, origin))
    if isinstance(node, Seq):
        return Seq([_moved(item, origin) for item in node.items], origin)
    return Scalar(node.value, origin)


def _place(
    node: Node | None, parts: list[str], value: Node, origin: Origin, above: tuple[str, ...]
) -> Node:
    """Return `node` with `value` at `parts`; maps on the way are made, list items must exist."""
    if not parts:
        return value
    head, rest = parts[0], parts[1:]
    if isinstance(node, Seq):
        at = _index(node, head, above)
        items = list(node.items)
        items[at] = _place(items[at], rest, value, origin, (*above, head))
        return Seq(items, node.origin)
    if node is not None and not isinstance(node, Map) and node.value is not None:
        raise _NoPlaceError(f"`{'.'.join(above)}` is a value and has no `{head}`", "")
    if not isinstance(node, Map):
        if above == ("passes",):
            raise _NoPlaceError(f"there is no step `{head}`", "the spec has no `passes`")
        node = Map({}, origin)
    placed = _place(node.items.get(head), rest, value, origin, (*above, head))
    return Map({**node.items, head: placed}, node.origin, {**node.keys, head: origin})


def _index(node: Seq, head: str, above: tuple[str, ...]) -> int:
    names = list(_names(node, above))
    if head in names:
        return names.index(head)
    if head.isdecimal() and int(head) < len(node.items):
        return int(head)
    kind = "step" if above == ("passes",) else "item"
    hint = did_you_mean(head, names) if names else f"it has {len(node.items)} items, from 0"
    raise _NoPlaceError(f"`{'.'.join(above)}` has no {kind} `{head}`", hint)


def _names(node: Seq, above: tuple[str, ...]) -> Iterator[str]:
    """Yield what list items can be called: steps by id, others by `name` or `use`."""
    if above == ("passes",):
        yield from step_ids(node)
        return
    texts = [_text(item, "name") or _text(item, "use") for item in node.items]
    if all(texts):
        yield from (text for text in texts if text)
