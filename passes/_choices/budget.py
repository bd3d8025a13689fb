"""One choice for each of many layers, the least loss within a budget of the whole model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fxcompress.analysis.cost import cost
from fxcompress.errors import UsageError
from passes._choices.programme import Problem, solve

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from passes._budget import CostBudget

__all__ = ["Ladder", "steps", "within_budget"]

_STEPS: Final = 24
"""Choices of each layer that a budget picks from."""

_GAP: Final = 1e-4
"""How far from the least loss the solver may stop: losses are known less well than that."""


@dataclass(frozen=True)
class Ladder:
    """What one layer may become.

    Attributes:
        costs: `parameters` and `macs` of each choice.
        losses: What the model loses by each.
        whole: `parameters` and `macs` of the layer as it is.
    """

    costs: Mapping[str, Sequence[float]]
    losses: Sequence[float]
    whole: Mapping[str, float]


def steps(most: int, multiple: int = 1) -> list[int]:
    """Return up to 24 numbers that reach `most`, evenly apart and multiples of `multiple`."""
    most //= multiple
    count = min(_STEPS, most)
    return sorted({max(1, round(most * (step + 1) / count)) * multiple for step in range(count)})


def within_budget(
    program: Program, ladders: Sequence[Ladder], budget: CostBudget, what: str
) -> list[int]:
    """Return the place of the choice of each layer.

    Args:
        program: The model.
        ladders: A layer each.
        budget: Limits of the model's costs.
        what: What is chosen, in the plural, for errors: `ranks`.

    Raises:
        UsageError: The budget cannot be met.
    """
    costs = {
        name: [list(ladder.costs[name]) for ladder in ladders] for name in ("parameters", "macs")
    }
    costs["loss"] = [list(ladder.losses) for ladder in ladders]
    limits = _limits(program, ladders, budget, Problem(costs, "loss", {}), what)
    picked = solve(Problem(costs, "loss", limits), gap=_GAP)
    if picked is None:
        raise UsageError(
            f"no {what} keep the budget",
            reason="each limit alone can be met, all of them together cannot",
            hint="raise one of them",
        )
    return picked


def _limits(
    program: Program,
    ladders: Sequence[Ladder],
    budget: CostBudget,
    problem: Problem,
    what: str,
) -> dict[str, float]:
    """Return what the layers together may cost."""
    whole = cost(program)
    now = {"parameters": whole.parameters, "macs": whole.macs}
    limits = {}
    for name, amount in budget.costs.items():
        rest = now[name] - sum(ladder.whole[name] for ladder in ladders)
        limit = amount.of(now[name]) - rest
        least = problem.least(name)
        if least > limit:
            reachable = math.ceil(least + rest)
            raise UsageError(
                f"{amount} of {name} cannot be met",
                reason=f"the least that {what} reach is {reachable:,} "
                f"({reachable / max(now[name], 1):.1%}); {int(rest):,} belong to nothing that is "
                "selected",
                hint=f"give at least {reachable}, or select more layers",
            )
        limits[name] = limit
    return limits
