"""One rule per op: how the dimensions of its operands, parameters and result are related.

A rule takes a `Site` and returns the dims of the result. It states equalities
(`site.solver.unify`), regroups factors (`regroup`), freezes what cannot shrink, and names constants
that follow sizes. Other packages add rules through the entry-point group `fxcompress.axes`, whose
values are mappings of op names (`fxcompress.ir.op_name`) to rules; a rule of ours cannot be
replaced.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from fxcompress.axes._site import Rule
from fxcompress.axes.rules import (
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
from fxcompress.errors import UsageError

__all__ = ["all_rules", "rule_of"]

_OURS: dict[str, Rule] = {
    name: rule
    for table in (
        elementwise,
        linear,
        products,
        experts,
        shape,
        parts,
        index,
        lookup,
        norm,
        spatial,
        sequence,
        create,
    )
    for name, rule in table.RULES.items()
}


@cache
def all_rules() -> dict[str, Rule]:
    """Return every rule by op name, those of installed packages included.

    Raises:
        UsageError: A package's entry point is no mapping of names to rules, or gives a rule for an
            op that has one.
    """
    found = dict(_OURS)
    for entry in sorted(entry_points(group="fxcompress.axes"), key=lambda each: each.name):
        table = entry.load()
        if not isinstance(table, dict) or not all(callable(rule) for rule in table.values()):
            raise UsageError(
                f"the entry point {entry.name} of fxcompress.axes is no table of rules",
                reason="it must name a dict of op names to callables",
                where=entry.value,
            )
        for name, rule in table.items():
            if name in found:
                raise UsageError(
                    f"{entry.name} gives a rule for {name}, which has one",
                    reason="two rules for one op would make results depend on what is installed",
                    where=entry.value,
                )
            found[name] = rule
    return found


def rule_of(op: str) -> Rule | None:
    """Return the rule of an op, or None."""
    return all_rules().get(op)
