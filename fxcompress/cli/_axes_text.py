"""An explanation of axes as text: terms in letters, what shrinks together, what cannot."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fxcompress.axes.explain import AxisFacts, Coupled, Coupling, DimFacts, Explanation

__all__ = ["axes_text", "coupling_text"]

_MODULES, _NAMES, _ENDS = 12, 6, 4
_ROLES = {"out": "makes", "in": "reads", "scale": "scales", "bias": "shifts", "other": "has"}


def axes_text(explanation: Explanation, unknown: Mapping[str, int]) -> str:
    """Return dimensions, then each free axis, then what is fixed and why.

    Args:
        explanation: What to show.
        unknown: Ops of the model without a rule, with counts.
    """
    lines = ["  dimensions"] if explanation.dims else []
    if explanation.tied:
        lines.append(f"    tied to {explanation.tied}")
    for owner, dims in groupby(explanation.dims, lambda dim: dim.place.rpartition("[")[0]):
        lines.append(f"    {owner}  {' × '.join(map(_dim, dims))}")
    told = {axis.letter for axis in explanation.axes}
    for letter in _used(explanation):
        if letter not in told:
            lines.append(f"    {letter} is {explanation.letters[letter]}")
    for axis in explanation.axes:
        if axis.letter:
            lines.extend(_free(axis))
    lines.extend(_fixed([axis for axis in explanation.axes if axis.frozen and axis.size > 1]))
    if unknown and any("has no rule" in axis.frozen for axis in explanation.axes):
        ops = ", ".join(f"{op} ({count} ×)" for op, count in unknown.items())
        lines.append(f"  ops without a rule in this model: {ops}")
    return "\n".join(lines)


def coupling_text(pair: Coupling) -> str:
    """Return whether two things shrink together, and along which way."""
    if not pair.axes:
        return f"  independent of {pair.right}: they have no axis in common"
    named = [name for name in pair.axes if name not in ("fixed", "free")]
    lines = [f"  shrinks with {pair.right}: {_listed(named) or 'a size of activations'}"]
    if pair.path:
        lines.append(f"    {_way(pair.path)}")
    return "\n".join(lines)


def _used(explanation: Explanation) -> list[str]:
    """Return the letters that the shown terms and numbers have."""
    terms = [dim.term for dim in explanation.dims]
    for axis in explanation.axes:
        terms += [text.rpartition(" = ")[2] for text in axis.constants[:_NAMES]]
    words = set(re.findall(r"[a-z]\d*", " ".join(terms)))
    return [letter for letter in explanation.letters if letter in words]


def _dim(dim: DimFacts) -> str:
    size = str(dim.size)
    return size if dim.term in (size, "1") else f"{size} = {dim.term}"


def _free(axis: AxisFacts) -> Iterator[str]:
    """Yield one axis with everything that shrinks with it, by module."""
    yield f"  {axis.letter} = {axis.name}  {axis.kind}, {axis.size}"
    modules = list(axis.modules.items())
    yield f"    {len(axis.coupled)} dimensions in {_modules(len(modules))} shrink with it"
    for module, members in modules[:_MODULES]:
        yield f"      {module or '(the model)'}: {_members(module, members)}"
    if len(modules) > _MODULES:
        yield f"      … {len(modules) - _MODULES} more modules (--format json has all)"
    if axis.constants:
        yield "    numbers that follow"
        yield from (f"      {text}" for text in axis.constants[:_NAMES])
    if len(axis.constants) > _NAMES:
        yield f"      … {len(axis.constants) - _NAMES} more"
    if axis.statistics:
        yield f"    statistics over it: {_listed(axis.statistics)}"


def _fixed(axes: Sequence[AxisFacts]) -> Iterator[str]:
    """Yield what cannot shrink, each reason with its way once."""
    by_reason: dict[tuple[str, str], list[AxisFacts]] = {}
    for axis in axes:
        by_reason.setdefault((axis.frozen, axis.path[-1]), []).append(axis)
    if by_reason:
        yield "  fixed"
    for (reason, _), members in by_reason.items():
        names = [f"{axis.size}" for axis in members]
        yield f"    {', '.join(names)}: {reason}"
        yield f"      {_way(members[0].path)}"


def _members(module: str, members: Sequence[Coupled]) -> str:
    found = []
    for role, same in groupby(members, lambda each: each.role):
        names = [each.place.removeprefix(f"{module}.") for each in same]
        found.append(f"{_ROLES[role]} {', '.join(names)}")
    return "; ".join(found)


def _way(path: Sequence[str]) -> str:
    if len(path) > 2 * _ENDS + 1:
        left_out = len(path) - 2 * _ENDS
        path = [*path[:_ENDS], f"… {left_out} more", *path[-_ENDS:]]
    return " → ".join(path)


def _modules(count: int) -> str:
    return "1 module" if count == 1 else f"{count} modules"


def _listed(names: Sequence[str]) -> str:
    more = f", … {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return ", ".join(names[:_NAMES]) + more
