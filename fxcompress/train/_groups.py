"""Parameters with options of their own: which group of a training's config each belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TypeVar

from fxcompress.errors import SelectorError
from fxcompress.train.config import ParameterGroup

__all__ = ["grouped", "options_of", "trained"]

T = TypeVar("T")


def grouped(
    groups: Sequence[ParameterGroup], names: Iterable[str]
) -> list[tuple[ParameterGroup | None, list[str]]]:
    """Return the names of each group, those of none first; a name belongs to the first that fits.

    Raises:
        SelectorError: A glob matches nothing, or a group is left with nothing.
    """
    names = list(names)
    taken: dict[str, int] = {}
    for place, group in enumerate(groups):
        for pattern in group.targets:
            fitting = [name for name in names if fnmatchcase(name, pattern)]
            if not fitting:
                raise SelectorError(
                    f"`{pattern}` in `groups` matches nothing",
                    reason=f"none of {len(names)} trained parameters has such a name",
                    hint=_hint(pattern, names),
                )
            for name in fitting:
                taken.setdefault(name, place)
        if place not in taken.values():
            raise SelectorError(
                f"group {place + 1} of `groups` is left with nothing",
                reason=f"earlier groups take all that {', '.join(group.targets)} matches",
                hint="put the narrower group first",
            )
    rest = [name for name in names if name not in taken]
    found: list[tuple[ParameterGroup | None, list[str]]] = [(None, rest)] if rest else []
    for place, group in enumerate(groups):
        found.append((group, [name for name in names if taken.get(name) == place]))
    return found


def trained(
    groups: Sequence[ParameterGroup], parameters: Mapping[str, T]
) -> list[tuple[ParameterGroup | None, dict[str, T]]]:
    """Return the parameters of each group but the frozen ones, by name; those of none first.

    Raises:
        SelectorError: A glob matches nothing, a group is left with nothing, or all are frozen.
    """
    found = [
        (group, {name: parameters[name] for name in names})
        for group, names in grouped(groups, parameters)
        if group is None or not group.freeze
    ]
    if not found:
        raise SelectorError(
            "`groups` freezes every parameter", reason=f"all {len(parameters)} are frozen"
        )
    return found


def options_of(group: ParameterGroup, lr: object) -> Mapping[str, object]:
    """Return the optimiser's options of a group, `scale` applied to the common rate."""
    if group.scale is None:
        return group.options
    assert isinstance(lr, float | int), "every optimiser of torch has a rate that is a number"
    return {**group.options, "lr": lr * group.scale}


def _hint(pattern: str, names: Sequence[str]) -> str:
    close = get_close_matches(pattern, names, n=1)
    if close:
        return f"did you mean `{close[0]}`?"
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"there are {', '.join(names[:8])}{more}"
