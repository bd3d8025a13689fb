"""Compose one tree from a spec, the specs it extends, overrides and variables.

Maps merge key by key, lists replace, and `passes` merge by id: a step of the extending spec with
the id of an inherited step changes that step in place, any other is appended.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from fxcompress.errors import Problem, SpecError
from fxcompress.pipeline._close import did_you_mean
from fxcompress.spec._override import apply_override, step_ids
from fxcompress.spec._source import Map, Node, Scalar, Seq
from fxcompress.spec._variables import mentions, substitute
from fxcompress.spec._yaml import read_file
from fxcompress.spec.models import MODEL_KINDS

__all__ = ["Composed", "compose", "compose_file", "merge"]

_MAX_CHAIN = 32
_MODEL_PATHS = {"weights", "program", "pt2", "hf"}
_TEACHER_PATHS = {"spec", "run", "outputs"}

_Files: TypeAlias = dict[Path, set[str]]
"""The files that were read, in order, and the variables that each mentions."""


@dataclass(frozen=True)
class Composed:
    """The composed tree, the files that took part (root first), and problems found on the way."""

    tree: Map
    files: tuple[Path, ...]
    problems: tuple[Problem, ...]


def compose_file(path: Path, overrides: Sequence[str] = ()) -> Composed:
    """Read `path` and all it extends, and apply `KEY=VALUE` overrides and variables.

    Raises:
        SpecError: A file cannot be read, is not a mapping, or extends itself.
    """
    files: _Files = {}
    tree = _load(path, str(path), (), files, path.parent)
    composed = compose(tree, overrides, set().union(*files.values()))
    return replace(composed, files=tuple(files))


def compose(
    tree: Map, overrides: Sequence[str] = (), mentioned: set[str] | None = None
) -> Composed:
    """Apply overrides and variables to a tree whose `extends` is resolved.

    `mentioned` holds the variables that the files mention; by default those that the tree does.
    """
    problems: list[Problem] = []
    mentioned = mentions(tree) if mentioned is None else mentioned
    for text in overrides:
        tree = apply_override(tree, text, problems)
    tree = substitute(tree, problems, mentioned)
    return Composed(tree, (), tuple(problems))


def _load(path: Path, name: str, chain: tuple[Path, ...], files: _Files, home: Path) -> Map:
    """Return the tree of `path` merged over the trees it extends."""
    real = path.resolve()
    tree = read_file(path, name)
    if not isinstance(tree, Map):
        problem = tree.origin.problem("a spec is a mapping", hint="start with `fxcompress: 1`")
        raise SpecError(f"{name} is not a spec", (problem,))
    files[real] = mentions(tree)
    tree = _rebase(tree, path.parent, home)
    extends = tree.items.get("extends")
    if extends is None:
        return tree
    own = Map({k: v for k, v in tree.items.items() if k != "extends"}, tree.origin, tree.keys)
    merged: Map | None = None
    for item in extends.items if isinstance(extends, Seq) else [extends]:
        base = _base(item, path, (*chain, real), files, home)
        merged = base if merged is None else merge(merged, base)
    return own if merged is None else merge(merged, own)


def _base(item: Node, path: Path, chain: tuple[Path, ...], files: _Files, home: Path) -> Map:
    """Return the tree of one entry of `extends`."""
    text = item.value if isinstance(item, Scalar) else None
    if not isinstance(text, str) or not text:
        problem = item.origin.problem("should be the path of a spec", key=("extends",))
        raise SpecError(f"{path} cannot be composed", (problem,))
    target = path.parent / text
    real = target.resolve()
    if real in chain or len(chain) > _MAX_CHAIN:
        names = " → ".join(p.name for p in (*chain, real))
        problem = item.origin.problem(f"extends itself: {names}", key=("extends",))
        raise SpecError(f"{path} cannot be composed", (problem,))
    if not target.is_file():
        near = (
            [p.name for p in sorted(target.parent.glob("*.yaml"))] if target.parent.is_dir() else []
        )
        hint = did_you_mean(target.name, near)
        problem = item.origin.problem(f"there is no file {text}", key=("extends",), hint=hint)
        raise SpecError(f"{path} cannot be composed", (problem,))
    return _load(target, os.path.normpath(target), chain, files, home)


def merge(base: Map, over: Map) -> Map:
    """Return `base` with `over` laid on top."""
    items, keys = dict(base.items), dict(base.keys)
    for key, value in over.items.items():
        below = items.get(key)
        if key == "passes" and isinstance(below, Seq) and isinstance(value, Seq):
            value = _merge_steps(below, value)
        elif isinstance(below, Map) and isinstance(value, Map) and _mixes(key, below, value):
            value = merge(below, value)
        items[key] = value
        keys[key] = over.key_origin(key)
    return Map(items, over.origin, keys)


_KINDS = {"model": set(MODEL_KINDS), "metric": {"use", "factory"}}


def _mixes(key: str, below: Map, value: Map) -> bool:
    """Whether two blocks speak of the same kind of thing, so that their settings can mix.

    `{timm: resnet18}` over `{factory: …, args: …}` replaces it; `{weights: w.safetensors}` merges.
    """
    if key == "data":
        named = ["factory" in block.items for block in (below, value)]
        return named[0] == named[1] or (named[0] and set(value.items) == {"args"})
    kinds = _KINDS.get(key, set())
    new = kinds & set(value.items)
    return not new or new == kinds & set(below.items)


def _merge_steps(base: Seq, over: Seq) -> Seq:
    """Merge lists of steps by id; the ids of the base may be implicit."""
    items = list(base.items)
    places = {step_id: index for index, step_id in enumerate(step_ids(base))}
    for step in over.items:
        own = step.items.get("id") if isinstance(step, Map) else None
        name = own.value if isinstance(own, Scalar) else None
        at = places.get(name) if isinstance(name, str) else None
        below = items[at] if at is not None else None
        if at is not None and isinstance(step, Map) and isinstance(below, Map):
            items[at] = _merge_step(below, step)
        else:
            items.append(step)
    return Seq(items, over.origin)


def _merge_step(below: Map, step: Map) -> Map:
    """Merge one step; another `use` replaces the step, since its options are another pass's."""
    use, old = step.items.get("use"), below.items.get("use")
    if isinstance(use, Scalar) and isinstance(old, Scalar) and use.value != old.value:
        return step
    return merge(below, step)


def _rebase(tree: Map, folder: Path, home: Path) -> Map:
    """Rewrite the relative paths of an inherited file so that they hold from the root spec."""
    if folder.resolve() == home.resolve():
        return tree
    prefix = os.path.relpath(folder.resolve(), home.resolve())
    return _rebased_map(tree, prefix, ())


def _rebased_map(node: Map, prefix: str, key: tuple[str, ...]) -> Map:
    items = {k: _rebased(v, prefix, (*key, k)) for k, v in node.items.items()}
    return Map(items, node.origin, node.keys)


def _rebased(node: Node, prefix: str, key: tuple[str, ...]) -> Node:
    if isinstance(node, Map):
        return _rebased_map(node, prefix, key)
    if isinstance(node, Seq):
        return Seq([_rebased(item, prefix, key) for item in node.items], node.origin)
    if not isinstance(node.value, str) or not _is_path(node.value, key):
        return node
    head, sep, rest = node.value.partition(":")
    if key == ("model",) and head in _MODEL_PATHS and sep:
        return Scalar(f"{head}:{_joined(prefix, rest)}", node.origin)
    return Scalar(_joined(prefix, node.value), node.origin)


def _joined(prefix: str, path: str) -> str:
    return path if os.path.isabs(path) else f"{prefix}/{path}".replace(os.sep, "/")


def _is_path(value: str, key: tuple[str, ...]) -> bool:
    """Whether a string is a path relative to its spec: by its key, or as a `file.py:function`."""
    if value.startswith("${"):
        return False
    if key[-1] == "factory" or key in {("model",), ("data",), ("metric",)}:
        kind, colon, _ = value.partition(":")
        return ".py:" in value or (key == ("model",) and bool(colon) and kind in _MODEL_PATHS)
    if key[:-1] == ("model",):
        return key[-1] in _MODEL_PATHS and value != "meta"
    if key[-2:-1] == ("teacher",):
        return key[0] == "passes" and key[-1] in _TEACHER_PATHS
    return len(key) == 3 and (key[0], key[2]) == ("data", "tensors")
