"""One small model per family of rules, with the axes that it has.

`FAMILIES` gives, for each file of `fxcompress/axes/rules` and for attention written out, a function
that builds the model with its inputs, and the table of its axes; `golden/axes` has the graphs that
pruning half of each axis makes of them.
"""

import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor, nn

from fxcompress.axes import Analysis
from tests.axes.goldens import (
    attention,
    create,
    elementwise,
    experts,
    index,
    linear,
    lookup,
    norm,
    parts,
    products,
    sequence,
    shape,
    spatial,
)

__all__ = ["FAMILIES", "Family", "table"]


@dataclass(frozen=True)
class Family:
    """A model of one family of rules, and its axes as `table` writes them."""

    build: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]
    axes: str


def _family(module: ModuleType) -> tuple[str, Family]:
    return module.__name__.rpartition(".")[2], Family(module.build, module.AXES.lstrip("\n"))


_MODULES = (
    attention, create, elementwise, experts, index, linear, lookup, norm, parts, products, sequence,
    shape, spatial,
)  # fmt: skip
FAMILIES = dict(map(_family, _MODULES))


def table(analysis: Analysis) -> str:
    """Return the axes with kind, size and places, then what is frozen, by reason."""
    lines: list[str] = []
    for axis in analysis.axes:
        spanned = ", under a statistic" if axis.statistics else ""
        lines.append(f"{axis.name}: {axis.kind}, {axis.size}{spanned}")
        lines += _wrapped(map(str, axis.places))
    reasons: dict[str, list[str]] = {}
    for axis in analysis.frozen:
        reasons.setdefault(str(axis.frozen), []).append(axis.name)
    for reason, names in reasons.items():
        lines += [f"frozen: {reason}", *_wrapped(names)]
    return "\n".join(lines) + "\n"


def _wrapped(names: Iterable[str]) -> list[str]:
    return textwrap.wrap(" ".join(names), 96, initial_indent="  ", subsequent_indent="  ")
