"""The files that a spec stands on: factories beside it, what these import from there, weights.

Nothing is imported: Python files are parsed, so that `check` can tell that a function is missing.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxcompress.errors import Problem
from fxcompress.pipeline._close import did_you_mean
from fxcompress.spec._source import Key, Map, Node, Scalar, Seq

__all__ = ["FactoryRef", "digest_files", "factory_files", "missing_files"]

DATA_FILES = (
    ("tensors",), ("images", "folder"), ("text", "tokenizer"), ("text", "files"),
    ("written", "teacher", "spec"), ("written", "teacher", "run"),
)  # fmt: skip
"""Where a split names files or folders."""


@dataclass(frozen=True)
class FactoryRef:
    """`source:name` taken apart; a source that ends in `.py` is a file beside the spec."""

    source: str
    name: str

    @classmethod
    def parse(cls, text: str) -> FactoryRef:
        """Take `file.py:function` or `package.module:callable` apart."""
        source, _, name = text.rpartition(":")
        return cls(source, name)

    def file(self, folder: Path) -> Path | None:
        """Return the Python file, or None for an importable module."""
        return folder / self.source if self.source.endswith(".py") else None


def factories(tree: Node, key: Key = ()) -> Iterator[tuple[Key, Scalar, FactoryRef]]:
    """Yield every factory that a document names, with its place."""
    if isinstance(tree, Map):
        for name, item in tree.items.items():
            text = item.value if isinstance(item, Scalar) else None
            short = not key and name in {"model", "data", "metric"}
            if (
                isinstance(item, Scalar)
                and isinstance(text, str)
                and ((name == "factory" and ":" in text) or (short and ".py:" in text))
            ):
                yield (*key, name), item, FactoryRef.parse(text)
            else:
                yield from factories(item, (*key, name))
    elif isinstance(tree, Seq):
        for index, item in enumerate(tree.items):
            yield from factories(item, (*key, index))


def factory_files(tree: Node, folder: Path) -> list[Path]:
    """Return the factory files of a spec and the files beside them that they import, sorted."""
    found: set[Path] = set()
    pending = [ref.file(folder) for _, _, ref in factories(tree)]
    while pending:
        path = pending.pop()
        if path is None or not path.is_file() or path.resolve() in found:
            continue
        found.add(path.resolve())
        pending.extend(_local_imports(path.resolve()))
    return sorted(found)


def _local_imports(path: Path) -> Iterator[Path]:
    """Yield the files beside `path` that it imports by name."""
    module = _parse(path)
    for node in ast.walk(module) if module is not None else ():
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            stem = node.module or ""
            names = [stem, *(f"{stem}.{alias.name}".lstrip(".") for alias in node.names)]
        for name in filter(None, names):
            place = path.parent.joinpath(*name.split("."))
            yield from (place.with_suffix(".py"), place / "__init__.py")


def _parse(path: Path) -> ast.Module | None:
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, OSError):
        return None


def digest_files(text: str, files: list[Path], folder: Path) -> str:
    """Return the SHA-256 of the resolved spec and of the files it stands on."""
    sha = hashlib.sha256(text.encode())
    root = folder.resolve()
    for path in files:
        inside = path.is_relative_to(root)
        name = path.relative_to(root).as_posix() if inside else path.name
        data = path.read_bytes()
        sha.update(f"\0{name}\0{len(data)}\0".encode())
        sha.update(data)
    return sha.hexdigest()


def missing_files(tree: Map, folder: Path) -> list[Problem]:
    """Return a Problem for each file or function that is named and is not there."""
    problems = [p for found in factories(tree) if (p := _factory_problem(*found, folder))]
    problems.extend(_missing_paths(tree, folder))
    return problems


def _factory_problem(key: Key, node: Scalar, ref: FactoryRef, folder: Path) -> Problem | None:
    path = ref.file(folder)
    if path is None:
        return None
    if not path.is_file():
        near = [f"{p.name}:{ref.name}" for p in _beside(path, "*.py")]
        hint = did_you_mean(f"{path.name}:{ref.name}", near)
        return node.origin.problem(f"there is no file {ref.source}", key=key, hint=hint)
    module = _parse(path)
    if module is None:
        return node.origin.problem(f"{ref.source} is not valid Python", key=key)
    names = list(_defined(module))
    if ref.name in names or "*" in names:
        return None
    hint = did_you_mean(ref.name, (name for name in names if not name.startswith("_")))
    return node.origin.problem(f"{ref.source} has no `{ref.name}`", key=key, hint=hint)


def _defined(module: ast.Module) -> Iterator[str]:
    """Yield the names that a module's top level binds, at any depth of `if` and `try`."""
    pending: list[Any] = list(module.body)
    while pending:
        node = pending.pop(0)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name.partition(".")[0]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))
        else:
            pending.extend(ast.iter_child_nodes(node))


def _missing_paths(tree: Map, folder: Path) -> Iterator[Problem]:
    for key, node in _paths(tree):
        text = str(node.value)
        path = folder / Path(text).expanduser()
        if key == ("model", "weights") and text == "meta":
            continue
        if not path.exists():
            hint = did_you_mean(path.name, (p.name for p in _beside(path, f"*{path.suffix}")))
            yield node.origin.problem(f"there is no file {text}", key=key, hint=hint)


def _paths(tree: Map) -> Iterator[tuple[Key, Scalar]]:
    model, data = tree.items.get("model"), tree.items.get("data")
    if isinstance(model, Scalar) and isinstance(model.value, str):
        kind, colon, rest = model.value.partition(":")
        if colon and kind in {"program", "pt2", "hf"}:
            yield ("model",), Scalar(rest, model.origin)
    for name in ("weights", "program", "pt2", "hf"):
        node = model.items.get(name) if isinstance(model, Map) else None
        if isinstance(node, Scalar) and isinstance(node.value, str):
            yield ("model", name), node
    for split, block in data.items.items() if isinstance(data, Map) else ():
        for place in DATA_FILES:
            yield from _texts(block, ("data", split), place)


def _texts(node: Node | None, key: Key, place: tuple[str, ...]) -> Iterator[tuple[Key, Scalar]]:
    """Yield the text, or each text of a list, that lies at a place below a node."""
    for name in place:
        node, key = node.items.get(name) if isinstance(node, Map) else None, (*key, name)
    if isinstance(node, Seq):
        for index, item in enumerate(node.items):
            yield from _texts(item, (*key, index), ())
    elif isinstance(node, Scalar) and isinstance(node.value, str):
        yield key, node


def _beside(path: Path, pattern: str) -> list[Path]:
    return sorted(path.parent.glob(pattern)) if path.parent.is_dir() else []
