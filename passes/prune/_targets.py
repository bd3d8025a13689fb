"""Which axes a spec selects, and why the others stay whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, TypeVar

from fxcompress.axes import Axis
from fxcompress.errors import SelectorError
from fxcompress.pipeline._close import did_you_mean, one_of
from fxcompress.rewrite.edits import Declined

if TYPE_CHECKING:
    from passes.prune.channels import PruneOptions

__all__ = ["Chosen", "amounts", "choose"]

T = TypeVar("T")


@dataclass(frozen=True)
class Chosen:
    """The axes that are selected, and those that a pattern names and that cannot shrink."""

    axes: tuple[Axis, ...]
    declined: tuple[Declined, ...]


def choose(free: Sequence[Axis], frozen: Sequence[Axis], options: PruneOptions) -> Chosen:
    """Return the axes that may shrink, in graph order.

    Args:
        free: The axes of an analysis.
        frozen: Its axes that cannot change.
        options: Kinds, targets, exclude and expect.

    Raises:
        SelectorError: A pattern matches nothing, or nothing that is free; nothing is left; or
            `expect` says otherwise.
    """
    for pattern in (*options.targets, *options.exclude):
        where = "targets" if pattern in options.targets else "exclude"
        _check_pattern(pattern, where, free, frozen)
    _check_kinds(free, frozen, options)
    hit = [a for a in free if not options.targets or _any(a, options.targets)]
    kind = [a for a in hit if not options.kinds or a.kind in options.kinds]
    kept = [a for a in kind if not _any(a, options.exclude)]
    counts = (
        f"of {len(free)} axes that can shrink {len(hit)} match the targets, {len(kind)} of these "
        f"the kinds, and {len(kind) - len(kept)} are excluded"
    )
    if options.expect is not None and len(kept) != options.expect:
        shown = one_of((axis.name for axis in kept), 8) or "nothing"
        raise SelectorError(
            f"{len(kept)} axes are selected, {options.expect} are expected",
            reason=f"{counts}; selected: {shown}",
            hint="narrow the targets, or correct `expect`",
        )
    if not kept:
        raise SelectorError("no axis is selected", reason=counts, hint=_kinds_hint(hit, options))
    stuck = [a for a in frozen if _could_be_meant(a, options)]
    return Chosen(tuple(kept), tuple(Declined(node=a.name, reason=str(a.frozen)) for a in stuck))


def _could_be_meant(axis: Axis, options: PruneOptions) -> bool:
    """Whether a reader would ask why a frozen axis stays whole; of kernel positions none does."""
    if options.targets:
        return _weighty(axis) and _any(axis, options.targets)
    return _weighty(axis) and (not options.kinds or axis.kind in options.kinds)


def _weighty(axis: Axis) -> bool:
    known = axis.frozen is None or axis.frozen.cause == "rule"
    return not known or any(place.role in ("in", "out") for place in axis.places)


def amounts(values: Mapping[str, T], axes: Iterable[Axis], what: str) -> dict[Axis, T]:
    """Return what the first glob that fits an axis says of it; axes that none fits are left out.

    Raises:
        SelectorError: A glob fits no selected axis.
    """
    known = tuple(axes)
    for pattern in values:
        if not any(_fits(axis, pattern) for axis in known):
            raise _nothing(pattern, what, known)
    found: dict[Axis, T] = {}
    for axis in known:
        first = next((each for each in values if _fits(axis, each)), None)
        if first is not None:
            found[axis] = values[first]
    return found


def _check_kinds(free: Sequence[Axis], frozen: Sequence[Axis], options: PruneOptions) -> None:
    kinds = sorted({axis.kind for axis in free})
    for kind in options.kinds:
        if kind not in kinds:
            stuck = [axis for axis in frozen if axis.kind == kind]
            raise SelectorError(
                f"`{kind}` in `kinds` matches no axis that can shrink",
                reason=_reasons(stuck) or f"none of {len(free)} axes is of this kind",
                hint=f"there are: {one_of(kinds)}" if kinds else "",
            )


def _reasons(stuck: Sequence[Axis]) -> str:
    more = f"; and {len(stuck) - 6} more" if len(stuck) > 6 else ""
    return "; ".join(f"{axis}: {axis.frozen}" for axis in stuck[:6]) + more


def _check_pattern(pattern: str, where: str, free: Sequence[Axis], frozen: Sequence[Axis]) -> None:
    if any(_fits(axis, pattern) for axis in free):
        return
    stuck = [axis for axis in frozen if _fits(axis, pattern)]
    stuck = [axis for axis in stuck if _weighty(axis)] or stuck
    if not stuck:
        raise _nothing(pattern, where, (*free, *frozen))
    if where == "exclude":
        return
    tied = any(axis.frozen and axis.frozen.cause == "output" for axis in stuck)
    raise SelectorError(
        f"`{pattern}` in `{where}` matches only axes that cannot shrink",
        reason=_reasons(stuck),
        hint="`signature: free` lets axes of the model's outputs shrink" if tied else "",
    )


def _nothing(pattern: str, where: str, axes: Sequence[Axis]) -> SelectorError:
    readers = [axis.name for axis in axes if _texts(axis, _reads) & _matching(axis, pattern)]
    if readers:
        hint = f"such modules only read an axis; what they read is {one_of(readers, 4)}"
    else:
        names = [text for axis in axes for text in sorted(_texts(axis, _makes))]
        below = sum(1 for name in names if name.startswith(f"{pattern}."))
        hint = (
            f"write `{pattern}.*` for what is inside it"
            if below
            else did_you_mean(pattern, names, kind="there are")
        )
    return SelectorError(
        f"`{pattern}` in `{where}` matches no axis",
        reason=f"none of {len(axes)} axes is called so or is made in such a module",
        hint=hint,
    )


def _any(axis: Axis, patterns: Iterable[str]) -> bool:
    return any(_fits(axis, pattern) for pattern in patterns)


def _fits(axis: Axis, pattern: str) -> bool:
    return any(_match(text, pattern) for text in _texts(axis, _makes))


def _match(text: str, pattern: str) -> bool:
    # Names end in `[0]`, which a glob would take for a choice of characters.
    return text == pattern or fnmatchcase(text, pattern)


def _matching(axis: Axis, pattern: str) -> set[str]:
    return {text for text in _texts(axis, _reads) if _match(text, pattern)}


def _makes(role: str) -> bool:
    return role != "in"


def _reads(role: str) -> bool:
    return role == "in"


def _texts(axis: Axis, counts: Callable[[str], bool]) -> set[str]:
    """Return what an axis may be called: its name, and places of some roles and their modules."""
    found = {axis.name} if counts("out") else set()
    for place in axis.places:
        if counts(place.role):
            found |= {str(place), place.tensor, place.tensor.rpartition(".")[0]}
    return found - {""}


def _kinds_hint(hit: Sequence[Axis], options: PruneOptions) -> str:
    if not hit or not options.kinds:
        return ""
    kinds = sorted({axis.kind for axis in hit})
    return f"the targets are of the kinds {one_of(kinds)}"
