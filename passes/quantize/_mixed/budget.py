"""From a budget to choices: the limits, the search by metric, and why a budget cannot be met."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fxcompress.errors import UsageError
from passes._choices.programme import Problem, solve
from passes.quantize._mixed.candidates import Candidates
from passes.quantize.mixed import FLOAT

if TYPE_CHECKING:
    from passes.quantize._mixed.judged import Judge
    from passes.quantize._mixed.timed import Timer
    from passes.quantize.mixed import MixedOptions

__all__ = ["Allocation", "allocate"]

_TRIES: Final = 10
"""Allocations of which the metric is measured."""


@dataclass(frozen=True)
class Allocation:
    """The place of each weight's choice, and the totals: bytes of the model, and loss."""

    picked: tuple[int, ...]
    bytes: int
    loss: float


def allocate(
    found: Candidates,
    losses: Sequence[Sequence[float]],
    options: MixedOptions,
    judge: Judge | None = None,
    timer: Timer | None = None,
) -> Allocation:
    """Return the choices that lose least within the budget, or cost least within a loss.

    Args:
        found: The weights and their costs.
        losses: Of each weight at each choice.
        options: Hold the budget.
        judge: Measures the metric, where the budget limits its loss; None while planning.
        timer: Measures the latency, where there is a budget of it; None while planning.

    Raises:
        UsageError: The budget cannot be met.
    """
    table = _Table(found, losses)
    limits = _cost_limits(found, options, table)
    if options.budget.sqnr is not None and any(map(any, losses)):
        picked = table.smallest({**limits, "loss": 10 ** (-options.budget.sqnr / 10)})
    elif judge is not None and judge.allowed is not None:
        picked = _smallest_by_metric(table, limits, judge)
    elif timer is not None:
        picked = _quick_enough(table, limits, timer, _float_bitops(found))
    elif limits:
        picked = solve(Problem(table.costs, "loss", limits))
    else:
        picked = table.largest()
    if picked is None:
        raise _impossible(found, options, table, limits)
    return Allocation(
        tuple(picked),
        found.rest + round(table.total("bytes", picked)),
        table.total("loss", picked),
    )


class _Table:
    """Costs and losses of all choices."""

    def __init__(self, found: Candidates, losses: Sequence[Sequence[float]]) -> None:
        self.costs: dict[str, Sequence[Sequence[float]]] = {
            "bytes": [each.bytes for each in found.weights],
            "bitops": [each.bitops for each in found.weights],
            "loss": losses,
        }

    def total(self, name: str, picked: Sequence[int]) -> float:
        return Problem(self.costs, name, {}).total(name, picked)

    def least(self, name: str) -> float:
        return Problem(self.costs, name, {}).least(name)

    def smallest(self, limits: dict[str, float]) -> list[int] | None:
        return solve(Problem(self.costs, "bytes", limits))

    def largest(self) -> list[int]:
        """Return the last choice of each, which has most bits."""
        return [len(row) - 1 for row in self.costs["bytes"]]


def _cost_limits(found: Candidates, options: MixedOptions, table: _Table) -> dict[str, float]:
    """Return what the weights together may cost.

    Raises:
        UsageError: Even the least bits cost more.
    """
    limits: dict[str, float] = {}
    if options.budget.size is not None:
        limits["bytes"] = options.budget.size.of(found.whole) - found.rest
        least = table.least("bytes")
        if least > limits["bytes"]:
            raise UsageError(
                f"a size of {options.budget.size} cannot be met",
                reason=f"the smallest reachable is {_size(least + found.rest)} "
                f"({(least + found.rest) / found.whole:.1%}), of which {_size(found.rest)} are "
                f"not to be quantised; {_bounding(found, 'bytes')}",
                hint="allow fewer bits in `choices`, select more layers or keep fewer, or give at "
                f"least {math.ceil(least + found.rest)}B",
            )
    if options.budget.bitops is not None:
        whole = _float_bitops(found)
        limits["bitops"] = options.budget.bitops.of(whole)
        least = table.least("bitops")
        if least > limits["bitops"]:
            raise UsageError(
                f"a budget of {options.budget.bitops} bitops cannot be met",
                reason=f"the smallest reachable is {least:,.0f} ({least / max(whole, 1):.1%}); "
                f"{_bounding(found, 'bitops')}",
                hint="allow fewer bits in `choices` or `activations.bits`, or give at least "
                f"{math.ceil(least)}",
            )
    return limits


def _float_bitops(found: Candidates) -> float:
    return sum(_whole(each.choices, each.bitops) for each in found.weights)


def _whole(choices: Sequence[int], bitops: Sequence[int]) -> float:
    """Return the bitops of a weight in float32, whether it may stay so or not."""
    if choices[-1] == FLOAT:
        return bitops[-1]
    # At b bits a weight takes macs · b · a, in float32 macs · 32 · 32.
    return bitops[-1] / choices[-1] * 32


def _bounding(found: Candidates, name: str) -> str:
    """Return which weights take most at their fewest bits."""
    rows = [
        (min(each.bytes if name == "bytes" else each.bitops), min(each.choices), each.tensor)
        for each in found.weights
    ]
    rows.sort(key=lambda row: -row[0])
    parts = [
        f"{tensor} ({'in float' if bits == FLOAT else f'at {bits} bits'}: "
        f"{_size(cost) if name == 'bytes' else f'{cost:,}'})"
        for cost, bits, tensor in rows[:3]
    ]
    return f"what takes most is {', '.join(parts)}"


def _smallest_by_metric(table: _Table, limits: dict[str, float], judge: Judge) -> list[int] | None:
    """Return the smallest allocation found that the metric bears.

    The allowed predicted loss is halved and raised between the least and the largest in steps of
    its logarithm, the metric being measured each time.
    """
    best = solve(Problem(table.costs, "loss", limits))
    if best is None or not judge.keeps(best):
        return None
    values = [value for row in table.costs["loss"] for value in row if value > 0]
    if not values:
        return table.smallest(limits)
    low, high = math.log(min(values)), math.log(sum(max(row) for row in table.costs["loss"]))
    least = math.inf
    for _ in range(_TRIES):
        middle = (low + high) / 2
        found = table.smallest({**limits, "loss": math.exp(middle)})
        if found is not None and judge.keeps(found):
            low = middle
            if table.total("bytes", found) < least:
                least, best = table.total("bytes", found), found
        elif found is None:
            low = middle
        else:
            high = middle
    return best


def _quick_enough(
    table: _Table, limits: dict[str, float], timer: Timer, whole: float
) -> list[int] | None:
    """Return the allocation that is measured to be as quick as asked, and loses least.

    Time rises with multiply-accumulates times bits, but by a law of the runtime's own: the limit on
    them is searched for, the time being measured.
    """
    least = table.least("bitops")

    def at(share: float) -> list[int] | None:
        bitops = max(share * whole, least)
        return solve(Problem(table.costs, "loss", {**limits, "bitops": bitops}))

    low = least / max(whole, 1.0)
    if at(low) is None:
        return None
    return at(timer.search(low, lambda share: at(share) or table.largest()))


def _impossible(
    found: Candidates, options: MixedOptions, table: _Table, limits: dict[str, float]
) -> UsageError:
    budget = options.budget
    best = solve(Problem(table.costs, "loss", limits)) or table.largest()
    if budget.sqnr is not None:
        reached = -10 * math.log10(max(table.total("loss", best), 1e-300))
        reason = f"the best within the other limits has {reached:.1f} dB"
    elif budget.metric_drop is not None:
        reason = "the allocation that loses least within the other limits loses more"
    else:
        reason = "each limit alone can be met, all of them together cannot"
    return UsageError(
        "no allocation keeps the budget",
        reason=reason,
        hint="allow more bits in `choices`, a larger size, or a larger loss",
    )


def _size(value: float) -> str:
    return f"{value / 2**20:.2f} MiB" if value >= 2**20 else f"{math.ceil(value):,} B"
