"""One tiny module per op, by family of rules."""

from tests.axes.cases import create, elementwise, index, linear, norm, sequence, shape, spatial
from tests.axes.support import Case

__all__ = ["ABSENT", "CASES", "SCALARS"]

CASES: tuple[Case, ...] = (
    *elementwise.CASES,
    *linear.CASES,
    *shape.CASES,
    *index.CASES,
    *norm.CASES,
    *spatial.CASES,
    *sequence.CASES,
    *create.CASES,
)
SCALARS = frozenset(
    {"not", "truth", "sym_float", "sym_int", "sym_ite", "sym_max", "sym_min", "sym_not"}
)
"""Ops on numbers: what is no tensor has no dimensions, and no rule is asked."""
ABSENT = frozenset({"fractional_max_pool1d"})
"""Ops that no Program holds: torch lacks it."""
