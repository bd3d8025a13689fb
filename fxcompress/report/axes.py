"""The axes that a run shrank: how far, what shrank with them, and a picture of the largest."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import fx

from fxcompress.axes import Analysis, Axis, Concat, Place, Product, Term, analyze
from fxcompress.axes.terms import axes_of
from fxcompress.ir import Program, node_ids, op_name, op_spec
from fxcompress.pipeline.records import RunRecord
from fxcompress.report.model import Axes, AxisRow, Rail, RailRow, Rails, RailStop

__all__ = ["shrunk_axes"]

_RAILS = 6
_FIRST, _LAST = 6, 3
_DOES = {
    "out": "makes", "in": "reads", "scale": "scales", "bias": "shifts", "other": "has",
    "join": "joins",
}  # fmt: skip


class _Entry(BaseModel):
    """What a decision says of an axis, whatever else it says."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    kind: str
    size: int
    kept: int
    statistics: bool = False


def shrunk_axes(record: RunRecord, before: Program) -> Axes | None:
    """Return the axes that the passes of a run shrank, or None.

    A pass tells by the field `axes` of its decision: entries with `name`, `kind`, `size` and
    `kept`. Where several passes shrank one axis, its first and last size count.

    Args:
        record: What the pipeline recorded.
        before: The original Program. An axis that it does not have is only in the table.
    """
    changes: dict[str, _Entry] = {}
    signature = "fixed"
    for step in record.passes:
        if step.id in record.stopped:
            continue
        for entry in _entries(step.decision):
            first = changes.get(entry.name, entry)
            changes[entry.name] = first.model_copy(update={"kept": entry.kept})
            signature = str(step.decision.get("signature", signature))
    changes = {name: each for name, each in changes.items() if each.kept < each.size}
    if not changes:
        return None
    analysis = analyze(before, signature="free" if signature == "free" else "fixed")
    known = {axis.name: axis for axis in analysis.axes}
    drawn = _largest(analysis, known, changes)
    letters = {axis: chr(ord("A") + place) for place, axis in enumerate(drawn)}
    rows = tuple(
        AxisRow(
            name=name,
            kind=each.kind,
            before=each.size,
            after=each.kept,
            coupled=len(known[name].places) if name in known else None,
            statistics=each.statistics,
            letter=letters.get(known[name], "") if name in known else "",
        )
        for name, each in changes.items()
    )
    return Axes(rows=rows, rails=_Picture(analysis, letters, changes).draw() if drawn else None)


def _entries(decision: Mapping[str, object]) -> tuple[_Entry, ...]:
    found = decision.get("axes")
    if not isinstance(found, (list, tuple)):
        return ()
    try:
        return tuple(_Entry.model_validate(each) for each in found)
    except ValidationError:
        return ()


def _largest(
    analysis: Analysis, known: Mapping[str, Axis], changes: Mapping[str, _Entry]
) -> list[Axis]:
    """Return the axis of each kind whose shrinking took most parameters, then others, in order."""
    slope = analysis.parameters.gradient(analysis.sizes)
    taken = {
        known[name]: (each.size - each.kept) * slope.get(known[name].id, 0.0)
        for name, each in changes.items()
        if name in known
    }
    order = sorted(taken, key=lambda axis: (-taken[axis], axis.id))
    kinds = {axis.kind: axis for axis in reversed(order)}
    first = [axis for axis in order if kinds[axis.kind] is axis]
    largest = list(dict.fromkeys([*first, *order]))[:_RAILS]
    return sorted(largest, key=lambda axis: axis.id)


@dataclass
class _Row:
    """A module's tensors, or a node that joins two values."""

    label: str
    at: int
    text: str = ""
    stops: dict[Axis, tuple[str, str]] = field(default_factory=dict)


class _Picture:
    """Rows in graph order, a rail for each axis, and a stop where a row has it."""

    def __init__(
        self, analysis: Analysis, letters: Mapping[Axis, str], changes: Mapping[str, _Entry]
    ) -> None:
        self.analysis = analysis
        self.letters = letters
        self.changes = changes
        self.ids = node_ids(analysis.program)
        self.at = _first_uses(analysis.program)

    def draw(self) -> Rails:
        rows = sorted((*self._holders(), *self._joins()), key=lambda row: row.at)
        shown = {
            id(row)
            for axis in self.letters
            for row in _ends([row for row in rows if axis in row.stops])
        }
        drawn: list[_Row | int] = []
        for seen, group in groupby(rows, lambda row: id(row) in shown):
            run = list(group)
            drawn += run if seen or len(run) == 1 else [len(run)]
        return Rails(
            rails=tuple(self._rail(axis, drawn) for axis in self.letters),
            rows=tuple(self._row(each) for each in drawn),
        )

    def _rail(self, axis: Axis, drawn: list[_Row | int]) -> Rail:
        places = [
            i for i, row in enumerate(drawn) if not isinstance(row, int) and axis in row.stops
        ]
        change = self.changes[axis.name]
        return Rail(
            letter=self.letters[axis],
            name=axis.name,
            before=change.size,
            after=change.kept,
            first=places[0],
            last=places[-1],
        )

    def _row(self, row: _Row | int) -> RailRow:
        if isinstance(row, int):
            return RailRow(label="", text=f"{row} more")
        order = list(self.letters)
        return RailRow(
            label=row.label,
            text=row.text,
            stops=tuple(
                RailStop(rail=order.index(axis), role=role, title=f"{where} {_DOES[role]} {axis}")
                for axis, (role, where) in sorted(
                    row.stops.items(), key=lambda item: order.index(item[0])
                )
            ),
        )

    def _holders(self) -> list[_Row]:
        """Return a row for each module that holds a tensor with one of the axes."""
        rows: dict[str, _Row] = {}
        places: dict[str, list[Place]] = {}
        for axis in self.letters:
            for place in axis.places:
                owner = place.tensor.rpartition(".")[0] or place.tensor
                row = rows.setdefault(owner, _Row(owner, self.at.get(place.tensor, 0)))
                row.at = min(row.at, self.at.get(place.tensor, row.at))
                row.stops.setdefault(axis, (place.role, str(place)))
                places.setdefault(owner, []).append(place)
        for owner, row in rows.items():
            row.text = self._tensors(list(dict.fromkeys(each.tensor for each in places[owner])))
        return list(rows.values())

    def _tensors(self, names: list[str]) -> str:
        """Return `weight [B, A, 3, 3]  bias [B]`, tensors of the same dimensions together."""
        by_dims: dict[str, list[str]] = {}
        for name in names:
            dims = ", ".join(self._write(term) for term in self.analysis.places(name))
            by_dims.setdefault(dims, []).append(name.rpartition(".")[2])
        return "  ".join(f"{', '.join(same)} [{dims}]" for dims, same in by_dims.items())

    def _write(self, term: Term) -> str:
        if not any(axis in self.letters for axis in axes_of(term)):
            return str(_size(term))
        if isinstance(term, Axis):
            return self.letters[term]
        if isinstance(term, Concat):
            return " | ".join(self._write(part) for part in term.parts)
        return "·".join(self._write(factor) for factor in term.factors)

    def _joins(self) -> list[_Row]:
        """Return a row for each element-wise node that two values of one of the axes meet in."""
        rows: list[_Row] = []
        for at, node in enumerate(self.analysis.program.nodes):
            if node.op not in ("call_function", "call_method"):
                continue
            spec = op_spec(op_name(node))
            if spec is None or not spec.elementwise:
                continue
            met = [self._axes_at(source) for source in node.all_input_nodes if _computed(source)]
            both = [axis for axis in self.letters if sum(axis in each for each in met) > 1]
            if both:
                name = self.ids[node]
                row = _Row(name, at, op_name(node), {axis: ("join", name) for axis in both})
                rows.append(row)
        return rows

    def _axes_at(self, node: fx.Node) -> set[Axis]:
        return {axis for term in self.analysis.terms(node) or () for axis in axes_of(term)}


def _computed(node: fx.Node) -> bool:
    return node.op not in ("get_attr", "placeholder")


def _first_uses(program: Program) -> dict[str, int]:
    """Return where in the graph each parameter and buffer is first used."""
    found: dict[str, int] = {}
    modules: dict[str, int] = {}
    for at, node in enumerate(program.nodes):
        if node.op == "call_module":
            modules.setdefault(str(node.target), at)
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                target = str(source.target)
                found.setdefault(program.ties.get(target, target), at)
    for name in program.state():
        module = name.rpartition(".")[0]
        if module in modules:
            canonical = program.ties.get(name, name)
            found[canonical] = min(modules[module], found.get(canonical, modules[module]))
    return found


def _ends(rows: list[_Row]) -> list[_Row]:
    return rows if len(rows) <= _FIRST + _LAST + 1 else [*rows[:_FIRST], *rows[-_LAST:]]


def _size(term: Term) -> int:
    if isinstance(term, Axis):
        return term.size
    if isinstance(term, Product):
        size = 1
        for factor in term.factors:
            size *= _size(factor)
        return size
    return sum(map(_size, term.parts))
