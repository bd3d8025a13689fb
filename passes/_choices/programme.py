"""The integer programme: one choice for each thing, the least loss or the least cost."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fxcompress.errors import MissingExtraError

__all__ = ["Problem", "need_scipy", "solve"]

Floats = NDArray[np.float64]

_FINE: Final = 1e5
"""What the best value found is scaled to, so that the solver's absolute gap of 1e-6 is no part."""

_NODES: Final = 50_000
"""Nodes of the search, after which the best found so far is taken."""


def need_scipy(who: str) -> None:
    """Check that the package that solves it is there.

    Args:
        who: The pass that needs it.

    Raises:
        MissingExtraError: It is not installed.
    """
    if importlib.util.find_spec("scipy") is None:
        raise MissingExtraError(
            f"{who} needs a package that is not installed",
            reason="SciPy solves the integer programme, and there is no scipy",
            hint="pip install 'fxcompress[mixed]'",
        )


@dataclass(frozen=True)
class Problem:
    """A choice for each thing: what is minimised, and what has a limit.

    Attributes:
        costs: By name, for each thing the value of each of its choices, not negative.
        minimise: Which of them.
        limits: The most that sums of others may be.
    """

    costs: Mapping[str, Sequence[Sequence[float]]]
    minimise: str
    limits: Mapping[str, float]

    def total(self, name: str, picked: Sequence[int]) -> float:
        """Return the sum of a cost over the picked choices."""
        return float(sum(row[i] for row, i in zip(self.costs[name], picked, strict=True)))

    def least(self, name: str) -> float:
        """Return the least that a cost alone can be."""
        return float(sum(min(row) for row in self.costs[name]))


def solve(problem: Problem, gap: float = 0.0) -> list[int] | None:
    """Return the place of the choice of each thing; None where no choices keep the limits.

    HiGHS stops 1e-6 short of the optimum in absolute terms, and losses span many powers of ten.
    So it is asked twice: choices that alone lose more than the first answer are then left out, and
    the rest is scaled by it.

    SciPy must be there: see `need_scipy`.

    Args:
        problem: What to choose from.
        gap: How far above the least value the answer may be, relatively.
    """
    objective = _flat(problem, problem.minimise)
    if not len(objective):
        return []
    largest = float(objective.max()) or 1.0
    first = _milp(problem, objective / largest, np.ones_like(objective), gap)
    if first is None:
        return None
    value = problem.total(problem.minimise, first)
    if value <= 0:
        return first
    allowed = (objective <= value * (1 + 1e-9)).astype(np.float64)
    scaled = np.minimum(objective / value, 1.0) * _FINE
    second = _milp(problem, scaled, allowed, gap)
    if second is None or problem.total(problem.minimise, second) > value:
        return first
    return second


def _flat(problem: Problem, name: str) -> Floats:
    return np.array([value for row in problem.costs[name] for value in row], dtype=np.float64)


def _milp(problem: Problem, objective: Floats, allowed: Floats, gap: float) -> list[int] | None:
    """Minimise over x in {0, 1} with one 1 per thing, places that are not `allowed` being 0."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    counts = [len(row) for row in problem.costs[problem.minimise]]
    starts = np.concatenate([[0], np.cumsum(counts)])
    columns = np.arange(starts[-1])
    rows = np.repeat(np.arange(len(counts)), counts)
    one_each = csr_array((np.ones(len(columns)), (rows, columns)))
    constraints: list[Any] = [LinearConstraint(one_each, 1, 1)]
    for name, limit in problem.limits.items():
        row = _flat(problem, name)
        size = max(float(row.max()), 1e-300)
        constraints.append(LinearConstraint((row / size)[None], -np.inf, limit / size))
    found = milp(
        objective,
        constraints=constraints,
        integrality=np.ones(len(columns)),
        bounds=Bounds(0, allowed),
        options={"mip_rel_gap": gap, "node_limit": _NODES},
    )
    if found.x is None:
        return None
    picked = [int(np.argmax(found.x[a:b])) for a, b in pairwise(starts)]
    over = any(
        problem.total(name, picked) > limit * (1 + 1e-9) for name, limit in problem.limits.items()
    )
    return None if over else picked
