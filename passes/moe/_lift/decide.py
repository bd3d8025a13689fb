"""Which mixtures are lifted, and the lifting itself, for every pass on experts."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from fxcompress.errors import PassError, SelectorError
from fxcompress.ir.naming import node_ids
from fxcompress.rewrite import GraphRewriter
from fxcompress.rewrite.edits import Declined
from passes.moe._lift.find import find_mixtures
from passes.moe._lift.found import Found
from passes.moe._lift.insert import insert, path_of
from passes.moe.lift import LiftDecision, Lifted, LiftOptions

if TYPE_CHECKING:
    from torch import fx

    from fxcompress.ir import Program

__all__ = ["decide_lifted", "lift", "lifted_first", "lifted_of", "touched"]


def decide_lifted(program: Program, options: LiftOptions | None = None) -> LiftDecision:
    """Return the mixtures to lift, all of them without options, and what is declined.

    Raises:
        SelectorError: A glob fits no mixture.
    """
    search = find_mixtures(program)
    ids = node_ids(program)
    lifted = [lifted_of(program, each, ids) for each in search.found]
    globs = options.mixtures if options is not None else ()
    for glob in globs:
        if not any(fnmatchcase(each.path, glob) for each in lifted):
            known = ", ".join(each.path for each in lifted) or "none"
            raise SelectorError(
                f"`{glob}` in `mixtures` matches no mixture of experts",
                reason=f"those that can be lifted are {known}",
            )
    if globs:
        lifted = [each for each in lifted if any(fnmatchcase(each.path, g) for g in globs)]
    declined = [
        Declined(
            node=ids[each.node],
            reason=each.reason,
            because_of=tuple(ids[node] for node in each.because_of),
        )
        for each in search.refused
    ]
    return LiftDecision(lifted=tuple(lifted), declined=tuple(declined))


def lifted_of(program: Program, found: Found, ids: dict[fx.Node, str]) -> Lifted:
    """Return what a decision says of a mixture."""
    first = found.feeds[0]
    return Lifted(
        path=path_of(program, found),
        experts=found.count,
        width=int(found.x.meta["val"].shape[-1]),
        hidden=int(first.down.x.meta["val"].shape[-1]),
        activation=first.activation,
        output=ids[found.output],
    )


def lifted_first(program: Program) -> tuple[Program, LiftDecision]:
    """Return the Program with all its mixtures as leaves, and what that takes.

    For passes that work on leaves: they decide on it, and lift what they touch when they rewrite.
    """
    decision = decide_lifted(program)
    if decision.lifted:
        rewriter = GraphRewriter(program)
        lift(rewriter, decision.lifted)
        program = rewriter.finish()
    return program, decision


def touched(decision: LiftDecision, paths: Iterable[str]) -> tuple[Lifted, ...]:
    """Return the part of a decision that is about these leaves."""
    wanted = set(paths)
    return tuple(each for each in decision.lifted if each.path in wanted)


def lift(rewriter: GraphRewriter, lifted: Iterable[Lifted]) -> None:
    """Put the leaves of a decision in place.

    Raises:
        PassError: A mixture is not there.
    """
    wanted = list(lifted)
    if not wanted:
        return
    found = {rewriter.id(each.output): each for each in find_mixtures(rewriter.program).found}
    for each in wanted:
        mixture = found.get(each.output)
        if mixture is None:
            raise PassError(f"there is no mixture of experts at {each.output}", where=each.path)
        insert(rewriter, mixture, each.path)
