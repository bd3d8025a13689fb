"""Classes of the emitted source: modules that differ in numbers only share one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from fxcompress.emit._source.body import Body, write_body
from fxcompress.emit._source.layout import WIDTH
from fxcompress.emit._source.literals import Literals, fill, holes, literal_text
from fxcompress.emit._source.naming import camel
from fxcompress.emit._source.pieces import Column, Container, New, Piece, columns_of, piece_text
from fxcompress.emit._source.root import write_root_body
from fxcompress.emit._source.tree import Unit
from fxcompress.ir.signature import Signature

__all__ = ["ClassSource", "write_classes"]

_TAKEN: Final = frozenset(
    {"Any", "CodebookWeight", "DynamicQuantize", "Exit", "Experts", "FakeQuantize",
     "Float8Rounding", "Float8Weight", "Int8Conv1d", "Int8Conv2d", "Int8Conv3d", "Int8Linear",
     "IntegerWeight", "Iterator",
     "PackedWeight", "Parameter", "Path", "RoundedRecurrent", "Signs", "StochasticDepth", "Tensor",
     "TopTokens", "TrainingSwitch", "OrderedDict", "Undecided"}
)  # fmt: skip
# Places of modules that leaves were given; a child's own name has neither dot nor bracket.
_ADDED: Final = ("self.", "self[")
_ANNOTATIONS: Final = {bool: "bool", int: "int", float: "float", str: "str"}


@dataclass
class _Draft:
    """A module's class before it is compared with others."""

    unit: Unit
    literals: Literals
    children: list[tuple[str, Piece]]
    tensors: list[tuple[str, str]]
    body: Body | None

    def key(self) -> tuple[Any, ...]:
        """Return what must be equal for two modules to share a class."""
        # What is never called has no class of the original: its name says what it is.
        origin = self.unit.region.origin if self.unit.region else self.unit.name
        body = self.body
        forward = (tuple(body.parameters), tuple(body.lines), body.result) if body else None
        kinds = tuple(type(literal.value).__name__ for literal in self.literals.found)
        return origin, tuple(self.children), tuple(self.tensors), forward, kinds


@dataclass
class ClassSource:
    """One class, ready for the template.

    `arguments` are those of the constructor, with their annotations.
    """

    name: str
    base: str
    doc: str
    arguments: list[tuple[str, str]]
    constructor: list[str]
    parameters: list[tuple[str, str]]
    body: list[str]
    result: str | None
    imports: set[str] = field(default_factory=set)


@dataclass
class _Made:
    """The class that a unit was given, and the values of its constructor's arguments."""

    name: str
    arguments: list[tuple[str, Any]]


def write_classes(
    root: Unit,
    symbols: Mapping[str, str],
    signature: Signature,
    outputs: Sequence[Any],
    name: str,
) -> list[ClassSource]:
    """Return the classes of a model in the order of definition; the last one is the model's."""
    writer = _Classes(symbols, camel(name))
    heights: dict[int, list[Unit]] = {}
    _by_height(root, heights)
    for height in sorted(heights):
        drafts = [writer.draft(unit) for unit in heights[height] if unit is not root]
        writer.share(drafts)
    draft = writer.draft(root, write_root_body, signature, outputs)
    writer.share([draft], camel(name))
    return writer.classes


def _by_height(unit: Unit, heights: dict[int, list[Unit]]) -> int:
    below = [_by_height(child, heights) for child in unit.children.values()]
    height = max(below, default=-1) + 1
    if unit.kind == "class":
        heights.setdefault(height, []).append(unit)
    return height


class _Classes:
    def __init__(self, symbols: Mapping[str, str], model: str) -> None:
        self.symbols = symbols
        self.made: dict[str, _Made] = {}
        self.classes: list[ClassSource] = []
        # The model's own class comes last, and must not stand over one of its parts.
        self.names: set[str] = {*_TAKEN, model}

    def draft(self, unit: Unit, root_body: Any = None, *context: Any) -> _Draft:
        """Return a unit's class with holes for its literals."""
        literals = Literals()
        children = [
            (name, self._piece(child, literals, name)) for name, child in unit.children.items()
        ]
        for name, child in unit.children.items():
            children += self._added(child, literals, f"self{unit.step(name)}")
        tensors = [*self._parameters(unit, literals), *self._buffers(unit, literals)]
        body = None
        if root_body is not None:
            body = root_body(unit, unit.region, self.symbols, literals, *context)
        elif unit.region is not None:
            body = write_body(unit, unit.region, self.symbols, literals)
        return _Draft(unit, literals, children, tensors, body)

    def _added(self, unit: Unit, literals: Literals, place: str) -> Iterable[tuple[str, Piece]]:
        """Yield the modules that leaves were given, and where: `self.bn.act`."""
        if unit.kind == "class":
            return
        for name, child in unit.children.items():
            inner = f"{place}{unit.step(name)}"
            if unit.kind == "leaf":
                yield inner, self._piece(child, literals, name)
            yield from self._added(child, literals, inner)

    def _piece(self, unit: Unit, literals: Literals, owner: str) -> Piece:
        if unit.leaf is not None:
            arguments = tuple(
                (
                    name,
                    _number(literals.hole(value, owner, name)),
                    default,
                    i < unit.leaf.positional,
                )
                for i, (name, value, default) in enumerate(unit.leaf.arguments)
            )
            return New(unit.leaf.cls, arguments)
        if unit.kind == "class":
            made = self.made[unit.path]
            given = tuple(
                (name, _number(literals.hole(value, owner, name)), ..., False)
                for name, value in made.arguments
            )
            return New(made.name, given)
        items = tuple(
            self._piece(child, literals, owner if name.isdigit() else name)
            for name, child in unit.children.items()
        )
        return Container(unit.kind, tuple(unit.children), items)

    def _parameters(self, unit: Unit, literals: Literals) -> Iterable[tuple[str, str]]:
        for name, tensor in unit.parameters.items():
            flag = "" if tensor.is_floating_point() else ", requires_grad=False"
            yield name, f"nn.Parameter({_empty(tensor, literals, name)}{flag})"

    def _buffers(self, unit: Unit, literals: Literals) -> Iterable[tuple[str, str]]:
        for name, (tensor, persistent) in unit.buffers.items():
            flag = "" if persistent else ", persistent=False"
            yield name, f'self.register_buffer("{name}", {_empty(tensor, literals, name)}{flag})'

    def share(self, drafts: Sequence[_Draft], name: str | None = None) -> None:
        """Make one class of all drafts that differ in literals only."""
        groups: dict[tuple[Any, ...], list[_Draft]] = {}
        for draft in drafts:
            groups.setdefault(draft.key(), []).append(draft)
        for group in groups.values():
            columns = columns_of(
                [draft.literals.found for draft in group],
                {name for name, _ in group[0].children},
            )
            chosen = name or self._class_name(group[0])
            self.names.add(chosen)
            self.classes.append(_source(chosen, group, columns))
            for index, draft in enumerate(group):
                values = _arguments(columns, index)
                self.made[draft.unit.path] = _Made(chosen, values)

    def _class_name(self, draft: _Draft) -> str:
        origin = draft.unit.region.origin if draft.unit.region else ""
        base = camel(origin.rpartition(".")[2] or draft.unit.name)
        if base not in self.names:
            return base
        known = {attribute for c in self.classes if c.name == base for attribute in c.constructor}
        for attribute, _ in draft.children:
            other = f"{base}With{camel(attribute)}"
            new = not any(line.startswith(f"self.{attribute} =") for line in known)
            if new and attribute.isidentifier() and other not in self.names:
                return other
        count = 2
        while f"{base}{count}" in self.names:
            count += 1
        return f"{base}{count}"


def _number(hole: str) -> int:
    (number,) = holes(hole)
    return number


def _empty(tensor: torch.Tensor, literals: Literals, name: str) -> str:
    sizes = ", ".join(literals.hole(int(size), name, "size") for size in tensor.shape)
    dtype = "" if tensor.dtype is torch.float32 else f"dtype={tensor.dtype}"
    if not sizes:
        return f"torch.empty({', '.join(['()', dtype]) if dtype else '()'})"
    return f"torch.empty({', '.join([sizes, dtype]) if dtype else sizes})"


def _body_holes(draft: _Draft) -> set[Any]:
    if draft.body is None:
        return set()
    return {number for line in [*draft.body.lines, draft.body.result] for number in holes(line)}


def _arguments(columns: Sequence[Column], index: int) -> list[tuple[str, Any]]:
    found: dict[str, Any] = {}
    for column in columns:
        if column.name is not None:
            found.setdefault(column.name, column.values[index])
    return list(found.items())


def _source(name: str, group: Sequence[_Draft], columns: Sequence[Column]) -> ClassSource:
    draft = group[0]
    # A value that `forward` needs is kept on the module.
    kept = sorted({str(columns[n].name) for n in _body_holes(draft) if columns[n].name is not None})

    def inside(number: int) -> str:
        column = columns[number]
        return literal_text(column.values[0]) if column.name is None else column.name

    def in_forward(number: int) -> str:
        column = columns[number]
        return literal_text(column.values[0]) if column.name is None else f"self.{column.name}"

    texts = [(name, piece_text(piece, columns)) for name, piece in draft.children]
    made_children = [(name, text) for name, text in texts if not name.startswith(_ADDED)]
    start = "super().__init__()"
    if draft.unit.base == "nn.ModuleList":
        start = f"super().__init__([{', '.join(text for _, text in made_children)}])"
    elif draft.unit.base == "nn.ModuleDict":
        pairs = ", ".join(f'"{name}": {text}' for name, text in made_children)
        start = f"super().__init__({{{pairs}}})"
    constructor = [start, *(f"self.{argument} = {argument}" for argument in kept)]
    if draft.unit.base == "nn.Module":
        constructor += [_assign(name, text) for name, text in made_children]
    constructor += [f"{name} = {text}" for name, text in texts if name.startswith(_ADDED)]
    for attribute, text in draft.tensors:
        made = fill(text, inside)
        constructor.append(made if made.startswith("self.") else f"self.{attribute} = {made}")
    body = draft.body
    return ClassSource(
        name,
        draft.unit.base,
        _doc([d.unit for d in group]),
        [(n, _annotation(columns, n)) for n, _ in _arguments(columns, 0)],
        constructor,
        body.parameters if body else [],
        [fill(line, in_forward) for line in body.lines] if body else [],
        fill(body.result, in_forward) if body else None,
        body.imports if body else set(),
    )


def _assign(attribute: str, text: str) -> str:
    if attribute.isidentifier():
        return f"self.{attribute} = {text}"
    return f'self.add_module("{attribute}", {text})'


def _annotation(columns: Sequence[Column], name: str) -> str:
    values = [v for column in columns if column.name == name for v in column.values]
    kinds = {_ANNOTATIONS.get(type(value), "") for value in values}
    if len(kinds) == 1 and "" not in kinds:
        return kinds.pop()
    if all(isinstance(v, (int, tuple)) and not isinstance(v, bool) for v in values):
        only = all(isinstance(v, tuple) for v in values)
        return "tuple[int, ...]" if only else "int | tuple[int, ...]"
    return "Any"


def _doc(units: Sequence[Unit]) -> str:
    region = units[0].region
    origin = region.origin if region else ""
    paths = [unit.path for unit in units]
    if not paths[0]:
        return "The model."
    short = origin.rpartition(".")[2] or "Modules"
    many = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    line = f"{short} at `{paths[0]}`{many}."
    if len(line) + 10 <= WIDTH:
        return line
    first = paths[0]
    if len(first) + 20 > WIDTH:
        first = f"….{first[len(first) + 24 - WIDTH :].partition('.')[2]}"
    return f"{short} ({len(paths)} modules).\n\n    The first is `{first}`.\n    "
