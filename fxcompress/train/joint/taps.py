"""Pairs of taps: each tap of the student with its counterpart in the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import fx

from fxcompress.errors import SelectorError
from fxcompress.ir import Program, module_of, node_ids
from fxcompress.nn import Tap
from fxcompress.rewrite.places import find_place
from fxcompress.rewrite.rewriter import GraphRewriter
from fxcompress.rewrite.taps import Put, put_taps, taps_of, without_taps

__all__ = ["TappedPair", "pair_taps", "tapped_teacher"]


@dataclass(frozen=True)
class TappedPair:
    """A tap of the student and the one of the teacher.

    Attributes:
        name: The tap's name.
        what: Which value of its place it reads.
        student: The student's tap node.
        teacher: The teacher's; None where the tap has no counterpart.
    """

    name: str
    what: str
    student: fx.Node
    teacher: fx.Node | None


def tapped_teacher(teacher: Program, student: Program) -> Program:
    """Return the teacher with a tap for each of the student's, its own ones taken out.

    Raises:
        SelectorError: A counterpart is not there, or is not one value.
    """
    bare = without_taps(teacher)
    wanted = [cast(Tap, module_of(node)) for node in taps_of(student).values()]
    if not any(tap.teacher is not None for tap in wanted):
        return bare
    ids = node_ids(bare)
    puts = []
    for tap in wanted:
        if tap.teacher is None:
            continue
        try:
            found = find_place(bare, tap.teacher, tap.what, where=tap.name)
        except SelectorError as error:
            raise SelectorError(
                f"the teacher has no counterpart of tap {tap.name}: {error.what}",
                reason=error.reason,
                hint=error.hint or "say `teacher:` in the tap",
                where=tap.name,
            ) from error
        made = Tap(tap.name, at=tap.teacher, what=tap.what)
        puts.append(Put(made, ids[found.node], found.fused))
    rewriter = GraphRewriter(bare)
    put_taps(rewriter, puts)
    return rewriter.finish()


def pair_taps(student: Program, teacher: Program | None) -> tuple[TappedPair, ...]:
    """Return a pair for each tap of the student; the teacher has been tapped."""
    ours = taps_of(student)
    theirs = {} if teacher is None else taps_of(teacher)
    return tuple(
        TappedPair(name, cast(Tap, module_of(node)).what, node, theirs.get(name))
        for name, node in ours.items()
    )
