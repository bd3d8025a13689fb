"""Resolve taps in model and teacher, and insert them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxcompress.errors import SelectorError, UsageError
from fxcompress.ir import node_ids
from fxcompress.nn import Tap as TapModule
from fxcompress.rewrite import Put, put_taps, taps_of
from fxcompress.rewrite.places import find_place, module_paths
from passes.distill._layers import match
from passes.distill.tap import LayerTaps, TapDecision, TapEntry, Tapped
from passes.train._teachers import load_teacher

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter
    from passes.distill.tap import LayerMap, TapOptions

__all__ = ["decide", "rewrite"]


def decide(program: Program, options: TapOptions, context: Context) -> TapDecision:
    """Return the decision of `distill.tap`."""
    teacher = load_teacher(options.teacher, context)
    entries = list(options.taps)
    mappings: list[LayerMap] = []
    pending: list[str] = []
    for layers in options.stacks:
        found = _of_layers(layers, program, teacher, context)
        entries += found[0]
        mappings += found[1]
        pending += found[2]
    taps = tuple(_tapped(entry, program, teacher) for entry in entries)
    _check(taps, program)
    return TapDecision(taps=taps, mappings=tuple(mappings), pending=tuple(pending))


def _of_layers(
    layers: LayerTaps, program: Program, teacher: Program | None, context: Context
) -> tuple[list[TapEntry], list[LayerMap], list[str]]:
    """Return a tap for each pair of layers."""
    if teacher is None:
        raise UsageError(
            f"the layers of {layers.at} have no teacher to learn from",
            hint="run the pass in a pipeline, or name single `taps`",
        )
    ours = module_paths(program, layers.at)
    glob = layers.teacher or layers.at
    try:
        theirs = module_paths(teacher, glob)
    except SelectorError as error:
        raise SelectorError(
            f"`{glob}` matches no module of the teacher", reason=error.reason, where=glob
        ) from error
    pairs, mapping, pending = match(layers, (program, ours), (teacher, theirs), context)
    entries = [
        TapEntry(
            name=f"{layers.name}_{mine}", at=ours[mine], what=layers.what, teacher=theirs[other]
        )
        for mine, other in pairs
    ]
    return entries, [] if mapping is None else [mapping], pending


def _tapped(entry: TapEntry, program: Program, teacher: Program | None) -> Tapped:
    found = find_place(program, entry.at, entry.what, where=entry.name)
    counterpart = entry.teacher or entry.at
    if teacher is not None:
        try:
            find_place(teacher, counterpart, entry.what, where=entry.name)
        except SelectorError as error:
            raise SelectorError(
                f"in the teacher: {error.what}",
                reason=error.reason,
                hint=error.hint if entry.teacher else "say `teacher:` in the tap",
                where=entry.name,
            ) from error
    return Tapped(
        name=entry.name,
        at=entry.at,
        what=entry.what,
        node=node_ids(program)[found.node],
        opened=found.fused,
        teacher=counterpart,
    )


def _check(taps: tuple[Tapped, ...], program: Program) -> None:
    """Check that names are new and that no two taps read one value."""
    known = taps_of(program)
    names: set[str] = set()
    places: dict[tuple[str, bool], str] = {}
    for tap in taps:
        if tap.name in names or tap.name in known:
            raise UsageError(
                f"two taps are called {tap.name}",
                reason="an earlier step has one" if tap.name in known else "",
                hint="give one another `name`",
                where=tap.name,
            )
        names.add(tap.name)
        place = (tap.node, tap.opened)
        if place in places:
            raise UsageError(
                f"the taps {places[place]} and {tap.name} read one value",
                reason=f"both stand for {tap.node}",
                hint="drop one; several losses may read a tap",
                where=tap.name,
            )
        places[place] = tap.name


def rewrite(rewriter: GraphRewriter, decision: TapDecision) -> None:
    """Insert taps; write attention out where its probabilities are tapped."""
    puts = [
        Put(TapModule(tap.name, tap.at, tap.what, tap.teacher, tap.opened), tap.node, tap.opened)
        for tap in decision.taps
    ]
    put_taps(rewriter, puts)
