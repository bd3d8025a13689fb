"""Meet a latency: search the MAC budget whose result is measured to be that quick."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from numpy.typing import NDArray

from fxcompress.analysis import latency
from fxcompress.analysis.latency import Clock
from fxcompress.axes import Axis
from fxcompress.errors import UsageError
from fxcompress.pipeline._probes import probes
from passes.prune._budget.spend import keep_best
from passes.prune._channels.shrink import shrunk

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.spec.units import Amount
    from passes.prune._channels.task import Task

__all__ = ["Stopwatch", "meet", "search"]

TOLERANCE: Final = 0.05
"""How far below the target a measurement may be, as a part of it."""

TRIES: Final = 12
REPEATS: Final = (10, 60)
SECONDS: Final = 2.0
"""A measurement repeats calls for about so long, within these numbers of repeats."""

Scores = Mapping[Axis, NDArray[np.float64]]
Sizes = dict[Axis, int]


def meet(task: Task, target: Amount, scores: Scores, context: Context) -> Sizes:
    """Return sizes of axes with which the Program is measured to be as quick as asked.

    Candidates are built and timed in turns with the Program as it is, so that a drift of the
    machine hits both.

    Raises:
        UsageError: The target cannot be reached, or is reached already.
    """
    watch = Stopwatch(task.program)
    whole = watch.seconds
    wanted = target.value if target.relative else target.value / whole
    if wanted >= 1:
        raise UsageError(
            f"a latency of {target} is met already",
            reason=f"one call takes {whole * 1e3:.3g} ms",
            hint="ask for less, or take the pass out",
        )
    found: dict[float, Sizes] = {}

    def measure(share: float) -> float:
        sizes = found.get(share)
        if sizes is None:
            sizes = found[share] = task.sizes_for([task.macs_goal(share)], scores)
        context.progress("measuring latency", len(found), TRIES)
        return watch.ratio(shrunk(task.program, task.analysis, keep_best(scores, sizes)))

    least = {axis: int(task.limits.allowed(axis)[-1]) for axis in task.axes}
    after = {**task.analysis.sizes, **{axis.id: size for axis, size in least.items()}}
    low = task.analysis.macs.at(after) / task.analysis.macs.at(task.analysis.sizes)
    found[low] = least
    share, ratio = search(wanted, low, measure)
    if ratio > wanted:
        raise UsageError(
            f"a latency of {target} cannot be met",
            reason=f"the quickest measured takes {ratio:.1%} of the time, about "
            f"{ratio * watch.seconds * 1e3:.3g} ms, with {share:.1%} of the MACs",
            hint="raise `max_ratio`, select more axes, or ask for less",
        )
    context.measured["latency_ms"] = (watch.seconds * 1e3, ratio * watch.seconds * 1e3)
    return found[share]


def search(
    wanted: float, low: float, measure: Callable[[float], float], tries: int = TRIES
) -> tuple[float, float]:
    """Return (share of the MACs, measured share of the time) closest below what is wanted.

    Time rises with MACs, but not in proportion, and is noisy: the next share is where a line
    between the two nearest measurements meets the middle of the tolerance, kept inside the bracket.

    Args:
        wanted: Share of the time, below 1.
        low: The least share of the MACs.
        measure: Share of the MACs -> share of the time.
        tries: How many measurements.
    """
    aim = wanted * (1 - TOLERANCE / 2)
    below = (low, measure(low))
    above = (1.0, 1.0)
    if below[1] > wanted:
        return below
    for _ in range(tries - 1):
        if below[1] >= wanted * (1 - TOLERANCE) or above[0] - below[0] < 1e-3:
            break
        part = (aim - below[1]) / max(above[1] - below[1], 1e-9)
        share = below[0] + (above[0] - below[0]) * min(max(part, 0.1), 0.9)
        ratio = measure(share)
        if wanted * (1 - TOLERANCE) <= ratio <= wanted:
            # One lucky measurement is not enough to end with.
            ratio = (ratio + measure(share)) / 2
        if ratio <= wanted:
            below = (share, ratio)
        else:
            above = (share, ratio)
    return below


@dataclass
class Stopwatch:
    """Times Programs on one input, in turns with the one given.

    Times are lower quartiles: what else runs on the machine only ever adds to them.
    """

    program: Program
    repeats: int = REPEATS[0]
    seconds: float = field(init=False)

    def __post_init__(self) -> None:
        # With one thread the processor's time is the call's, whatever else runs on the machine.
        self._clock: Clock = "cpu" if torch.get_num_threads() == 1 else "wall"
        self._inputs = probes(self.program, 0)[0]
        self._original = self._call(self.program)
        self.seconds = self._time({"original": self._original})["original"]
        self.repeats = int(min(max(SECONDS / self.seconds / 2, REPEATS[0]), REPEATS[1]))

    def ratio(self, program: Program) -> float:
        """Return the time of a Program over that of the one given."""
        times = self._time({"original": self._original, "result": self._call(program)})
        self.seconds = times["original"]
        return times["result"] / times["original"]

    def _time(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        with torch.no_grad():
            found = latency(calls, repeats=self.repeats, clock=self._clock)
        return {name: each.lower_quartile_ms / 1e3 for name, each in found.items()}

    def _call(self, program: Program) -> Callable[[], object]:
        """Return a call of the graph alone, without packing of inputs and outputs."""
        from torch.fx.graph import CodeGen

        flat = program.copy().module.eval()
        flat.graph.set_codegen(CodeGen())
        flat.recompile()
        return lambda: flat(*self._inputs)
