"""Turn pydantic's errors into Problems: the place, the key as written, and what was meant."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from fxcompress.errors import Problem
from fxcompress.pipeline._close import did_you_mean
from fxcompress.spec._source import Key, Map, Node, Origin, Scalar, descend

__all__ = ["explain", "field_names", "known_keys"]

_MAX_TAGS = 6
_QUOTED = re.compile(r"'([^']*)'")
_PLAIN = {
    "string_type": "should be text",
    "int_type": "should be a whole number",
    "int_from_float": "should be a whole number",
    "float_type": "should be a number",
    "bool_type": "should be true or false",
    "dict_type": "should be a mapping",
    "model_type": "should be a mapping",
    "model_attributes_type": "should be a mapping",
    "dataclass_type": "should be a mapping",
    "tuple_type": "should be a list",
    "list_type": "should be a list",
    "set_type": "should be a list",
    "frozen_set_type": "should be a list",
    "none_required": "should be left out",
    "finite_number": "should be a finite number",
}


def explain(
    error: ValidationError, tree: Node, model: type[BaseModel], at: Key = ()
) -> list[Problem]:
    """Return one Problem per thing that is wrong.

    Args:
        error: What validation of the tree below `at` raised.
        tree: The whole document.
        model: The model that was validated.
        at: Where in the document that model's value is.
    """
    node = [tree, *(child for _, child in descend(tree, at))][-1]
    details = error.errors(include_url=False, include_context=True)
    found = [_Located(detail, node) for detail in details]
    return [item.problem(model, at) for item in _best_branches(found)]


class _Located:
    """One pydantic error and the part of the document that it is about."""

    def __init__(self, detail: Any, root: Node) -> None:
        self.kind: str = detail["type"]
        self.detail = detail
        loc = tuple(part for part in detail["loc"] if part != "[key]")
        self.about_key = self.kind == "extra_forbidden" or len(loc) < len(detail["loc"])
        self.missing = str(loc[-1]) if self.kind == "missing" and loc else ""
        self.path, self.tags, self.node = _resolve(root, loc[:-1] if self.missing else loc)
        self.root = root

    def problem(self, model: type[BaseModel], at: Key) -> Problem:
        """Return the Problem, with its hint."""
        key = (*at, *self.path)
        if self.kind == "extra_forbidden":
            hint = did_you_mean(self.path[-1], known_keys(model, self.path[:-1], self.root))
            return self._origin().problem("unknown key", key=key, hint=hint)
        if self.missing:
            known = known_keys(model, self.path, self.root)
            near = did_you_mean(self.missing, _spare(self.node, known))
            hint = near if near.startswith("did you mean") else ""
            message = f"`{self.missing}` is missing"
            return self.node.origin.problem(message, key=key, hint=hint)
        message, hint = self._message()
        return self._origin().problem(message, key=key, hint=hint)

    def inside(self, other: _Located) -> bool:
        """Whether this error got deeper into the value that a branch of a union refused."""
        depth = len(other.path)
        deeper = len(self.path) > depth and self.path[:depth] == other.path
        return deeper and bool(self.tags and other.tags) and self.tags != other.tags

    @property
    def wants_type(self) -> bool:
        """Whether the value should be of another type altogether."""
        return self.kind.endswith("_type")

    def _origin(self) -> Origin:
        if self.about_key and self.path:
            parent = _resolve_exact(self.root, self.path[:-1])
            if isinstance(parent, Map):
                return parent.key_origin(str(self.path[-1]))
        return self.node.origin

    def _message(self) -> tuple[str, str]:
        detail, context = self.detail, self.detail.get("ctx", {})
        if self.kind == "union_tag_invalid":
            known = _QUOTED.findall(str(context.get("expected_tags", "")))
            return f"unknown `{context.get('tag')}`", did_you_mean(context.get("tag"), known)
        if self.kind == "union_tag_not_found":
            return f"`{str(context.get('discriminator')).strip(chr(39))}` is missing", ""
        if self.kind in {"literal_error", "enum"}:
            known = _QUOTED.findall(str(context.get("expected", "")))
            if known and isinstance(detail.get("input"), str):
                return f"unknown value {_shown(detail['input'])}", did_you_mean(
                    detail["input"], known
                )
        if self.kind == "value_error":
            text = str(context.get("error", detail["msg"]))
        else:
            text = _PLAIN.get(self.kind) or re.sub(r"^\w+ should", "should", detail["msg"])
            text = text.replace("valid integer", "whole number")
        if isinstance(self.node, Scalar) and not self.about_key:
            text = f"{text}, not {_shown(self.node.value)}"
        return text, ""


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _resolve(root: Node, loc: Sequence[str | int]) -> tuple[Key, Key, Node]:
    """Return the key path of a pydantic location, the union tags left out of it, and the value.

    Of all ways to read the location, the one that uses most of its parts wins; among equals the
    one that uses the last part, since that is the key that the error is about.
    """
    best: tuple[tuple[int, bool], Key, Key, Node] = ((-1, False), (), (), root)
    stack: list[tuple[Key, Key, Node, bool]] = [((), (), root, not loc)]
    while stack:
        path, tags, node, last = stack.pop()
        index = len(path) + len(tags)
        if index == len(loc):
            best = max(best, ((len(path), last), path, tags, node), key=lambda item: item[0])
            continue
        part = loc[index]
        for _, child in descend(node, (part,)):
            stack.append(((*path, part), tags, child, index == len(loc) - 1))
        if isinstance(part, str) and len(tags) < _MAX_TAGS:
            stack.append((path, (*tags, part), node, False))
    return best[1:]


def _resolve_exact(root: Node, path: Key) -> Node:
    return [root, *(child for _, child in descend(root, path))][-1]


def _spare(node: Node, known: Iterable[str]) -> list[str]:
    """Return keys of a mapping that its model does not know: likely misspellings."""
    names = set(known)
    return [key for key in node.items if key not in names] if isinstance(node, Map) else []


def _best_branches(found: list[_Located]) -> list[_Located]:
    """Drop the complaints of the branches of a union that the value was never meant for.

    A smart union reports every branch. Where one got deeper into the value, or takes its type and
    refuses the value, the others are noise. Of several complaints about one value by branches, the
    first stays.
    """
    kept = [item for item in found if not any(other.inside(item) for other in found)]
    typed = {item.path for item in kept if item.tags and not item.wants_type and not item.missing}
    kept = [item for item in kept if not (item.wants_type and item.tags and item.path in typed)]
    merged: dict[tuple[Key, str], _Located] = {}
    for item in kept:
        slot = "" if item.tags and item.wants_type else item.missing or item.kind
        first = merged.setdefault((item.path, slot), item)
        if first is not item and first.kind != item.kind and slot == "":
            _join(first, item)
    return list(merged.values())


def _join(first: _Located, other: _Located) -> None:
    """Make one message of two types that a value may have."""
    ours, theirs = (_PLAIN.get(x.kind, x.detail["msg"]) for x in (first, other))
    first.kind = "joined"
    first.detail = {**first.detail, "msg": f"{ours} or {theirs.removeprefix('should be ')}"}


def known_keys(model: Any, path: Key, root: Node | None = None) -> list[str]:
    """Return the keys that the value at `path` below `model` may have, for suggestions."""
    types, node = _branches(model, root), root
    for part in path:
        types = [inner for kind in types for inner in _inner(kind, part)]
        node = _resolve_exact(node, (part,)) if node is not None else None
        types = [branch for kind in types for branch in _branches(kind, node)]
    models = [kind for kind in types if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return list(dict.fromkeys(name for kind in models for name in field_names(kind)))


def field_names(model: type[BaseModel]) -> dict[str, Any]:
    """Return the keys of a model, aliases applied, with the annotation of each."""
    fields = model.model_fields
    return {str(field.alias or name): field.annotation for name, field in fields.items()}


def _branches(kind: Any, node: Node | None) -> list[Any]:
    """Return the members of a union, without those whose literal fields contradict the value."""
    if get_origin(kind) is Annotated:
        return _branches(get_args(kind)[0], node)
    if get_origin(kind) in {Union, UnionType}:
        found = [b for arg in get_args(kind) if arg is not NoneType for b in _branches(arg, node)]
        fitting = [branch for branch in found if _fits(branch, node)]
        return fitting or found
    return [kind]


def _fits(kind: Any, node: Node | None) -> bool:
    """Whether a mapping can be meant as this model: its literals agree, or a key is its own."""
    if not (isinstance(kind, type) and issubclass(kind, BaseModel) and isinstance(node, Map)):
        return not isinstance(node, Map) or not isinstance(kind, type) or kind is dict
    required = [str(f.alias or n) for n, f in kind.model_fields.items() if f.is_required()]
    for name, annotation in field_names(kind).items():
        given = node.items.get(name)
        if get_origin(annotation) is Literal and isinstance(given, Scalar):
            if given.value not in get_args(annotation):
                return False
    return all(name in node.items for name in required)


def _inner(kind: Any, part: str | int) -> list[Any]:
    """Return the types of the item `part` of a container or model."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        annotation = field_names(kind).get(str(part))
        return [annotation] if annotation is not None else []
    origin, args = get_origin(kind), get_args(kind)
    if len(args) == 2 and origin is not tuple:
        return [args[1]]
    return [arg for arg in args if arg is not Ellipsis][:1] if isinstance(part, int) else []
