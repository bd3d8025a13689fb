"""What changed between two Programs, or between two golden texts, as typed entries."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from fxcompress.ir._changes import (
    OUTPUT_TOLERANCE,
    STATE_TOLERANCE,
    GraphDiff,
    Group,
    NodeChange,
    OutputChange,
    StateChange,
    Verdict,
)
from fxcompress.ir._numbers import heads_agree
from fxcompress.ir._render_diff import render_diff
from fxcompress.ir.text import StateLine, Text, parse, text_of

if TYPE_CHECKING:
    from fxcompress.ir.program import Program

__all__ = [
    "OUTPUT_TOLERANCE",
    "STATE_TOLERANCE",
    "GraphDiff",
    "Group",
    "NodeChange",
    "OutputChange",
    "StateChange",
    "Verdict",
    "diff",
    "render_diff",
    "sticky",
]


def diff(
    before: Program | Text | str,
    after: Program | Text | str,
    *,
    state_tolerance: float = STATE_TOLERANCE,
    output_tolerance: float = OUTPUT_TOLERANCE,
) -> GraphDiff:
    """Return what changed from one program or golden text to another.

    Args:
        before: A Program, a parsed text, or the content of a `.fxg` file.
        after: Likewise.
        state_tolerance: Difference of a tensor's figures that is none, per largest magnitude.
        output_tolerance: Likewise for outputs.
    """
    a, b = _text(before), _text(after)
    nodes = tuple(_node_changes(a, b))
    state = tuple(_state_changes(a, b, state_tolerance))
    outputs = tuple(_output_changes(a, b, output_tolerance))
    returns = a.returns != b.returns
    verdict = _verdict(a, b, nodes, state, outputs, returns, state_tolerance)
    return GraphDiff(a, b, nodes, state, outputs, returns, verdict)


def _text(source: Program | Text | str) -> Text:
    if isinstance(source, Text):
        return source
    return parse(source) if isinstance(source, str) else text_of(source)


def _node_changes(a: Text, b: Text) -> Iterator[NodeChange]:
    old = {line.id: line for line in a.nodes}
    new = {line.id: line for line in b.nodes}
    left, right = list(old), list(new)
    matcher = difflib.SequenceMatcher(None, left, right, autojunk=False)
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        if tag == "equal":
            for name in left[i1:i2]:
                if old[name].body != new[name].body:
                    yield NodeChange("change", name, old[name], new[name])
            continue
        for name in left[i1:i2]:
            if name not in new:
                yield NodeChange("remove", name, old[name], None)
        for name in right[j1:j2]:
            if name not in old:
                yield NodeChange("add", name, None, new[name])
            elif old[name].body != new[name].body:
                yield NodeChange("change", name, old[name], new[name])
            else:
                yield NodeChange("move", name, old[name], new[name])


def _state_changes(a: Text, b: Text, tolerance: float) -> Iterator[StateChange]:
    if a.state is None or b.state is None:
        return
    old = {line.name: line for line in a.state}
    new = {line.name: line for line in b.state}
    for name in sorted(old.keys() | new.keys()):
        was, now = old.get(name), new.get(name)
        if was is None or now is None:
            yield StateChange("add" if was is None else "remove", name, was, now)
        elif was.tied != now.tied:
            yield StateChange("tie", name, was, now)
        elif was.type != now.type or (was.numbers is None) != (now.numbers is None):
            yield StateChange("type", name, was, now)
        elif was.numbers is not None and now.numbers is not None and not _same(was, now, tolerance):
            yield StateChange("numbers", name, was, now, was.numbers.distance(now.numbers))


def _same(was: StateLine, now: StateLine, tolerance: float) -> bool:
    # The hash shows what the figures cannot, but it also differs by one rounding of one element;
    # it decides only for values that are exact everywhere.
    assert was.numbers is not None
    assert now.numbers is not None
    exact = was.type[0] in "iub" and not was.type.startswith("bf")
    if exact and was.hash and now.hash:
        return was.hash == now.hash
    return was.numbers.agrees(now.numbers, tolerance)


def _output_changes(a: Text, b: Text, tolerance: float) -> Iterator[OutputChange]:
    if a.outputs is None or b.outputs is None:
        return
    for index in range(max(len(a.outputs), len(b.outputs))):
        was = a.outputs[index] if index < len(a.outputs) else None
        now = b.outputs[index] if index < len(b.outputs) else None
        if was is None or now is None:
            yield OutputChange("add" if was is None else "remove", index, was, now)
        elif was.type != now.type or (was.numbers is None) != (now.numbers is None):
            yield OutputChange("type", index, was, now)
        elif was.numbers is not None and now.numbers is not None:
            distance = was.numbers.distance(now.numbers)
            scale = max(was.numbers.absmax, now.numbers.absmax)
            heads = heads_agree(was.head, now.head, tolerance, scale)
            if not heads or not was.numbers.agrees(now.numbers, tolerance):
                yield OutputChange("numbers", index, was, now, distance)


def _verdict(
    a: Text,
    b: Text,
    nodes: tuple[NodeChange, ...],
    state: tuple[StateChange, ...],
    outputs: tuple[OutputChange, ...],
    returns: bool,
    tolerance: float,
) -> Verdict:
    if any(change.kind != "numbers" for change in outputs):
        return Verdict.STRUCTURE
    if nodes or returns or any(change.kind != "numbers" for change in state):
        same_graph = _anonymous(a) == _anonymous(b) and _same_state_renamed(a, b, tolerance)
        return Verdict.NAMES if same_graph and not outputs else Verdict.STRUCTURE
    if state or outputs:
        return Verdict.NUMBERS
    return Verdict.NAMES if a.name != b.name else Verdict.IDENTICAL


_REFERENCE: Final = re.compile(r"%[^\s,()\[\]{}:]+")


def _anonymous(text: Text) -> list[str]:
    """Return the graph with each node named by its place: equal for a mere renaming."""
    place = {f"%{line.id}": f"%{i}" for i, line in enumerate(text.nodes)}

    def known(match: re.Match[str]) -> str:
        return place.get(match.group(), match.group())

    return [_REFERENCE.sub(known, line.body) for line in text.nodes] + [
        _REFERENCE.sub(known, text.returns)
    ]


def _same_state_renamed(a: Text, b: Text, tolerance: float) -> bool:
    """Whether the tensors are the same but for their names."""
    left = list(a.state or ())
    unmatched = list(b.state or ())
    if len(left) != len(unmatched):
        return False
    for was in left:
        for now in unmatched:
            if (
                bool(was.tied) == bool(now.tied)
                and was.type == now.type
                and (
                    was.numbers is None
                    or now.numbers is None
                    or was.hash == now.hash
                    or _same(was, now, tolerance)
                )
            ):
                unmatched.remove(now)
                break
        else:
            return False
    return True


def sticky(old: Text, new: Text) -> Text:
    """Return `new` with the old spelling of every number that is within tolerance.

    So an update on another machine shows only what really changed.
    """
    changes = diff(old, new)
    moved_state = {change.name for change in changes.state}
    moved_outputs = {change.index for change in changes.outputs}
    lines: Mapping[str, StateLine] = {line.name: line for line in old.state or ()}
    outputs = {line.index: line for line in old.outputs or ()}
    state = new.state and tuple(
        lines[s.name] if s.name in lines and s.name not in moved_state else s for s in new.state
    )
    kept = new.outputs and tuple(
        outputs[o.index] if o.index in outputs and o.index not in moved_outputs else o
        for o in new.outputs
    )
    return replace(new, state=state, outputs=kept)
