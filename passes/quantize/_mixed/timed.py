"""The time of whole allocations in a runtime, measured in turns with the model as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fxcompress.errors import UsageError
from passes._latency import TRIES, Stopwatch, search

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.spec.units import Amount

__all__ = ["Timer"]


class Timer:
    """Meets a latency.

    Args:
        program: The model as it is; its time is what a percentage is a share of.
        runtime: Of `fxcompress.emit.RUNTIMES`.
        target: What is asked for.
        built: Places of choices -> the Program with these.
        context: Hears of the progress, and holds what was measured.

    Raises:
        MissingExtraError: The runtime is not installed.
        UsageError: The model is that quick already.
    """

    def __init__(
        self,
        program: Program,
        runtime: str,
        target: Amount,
        built: Callable[[Sequence[int]], Program],
        context: Context,
    ) -> None:
        self.watch = Stopwatch(program, runtime)
        self.runtime, self.target, self.built, self.context = runtime, target, built, context
        whole = self.watch.seconds
        self.wanted = target.value if target.relative else target.value / whole
        if self.wanted >= 1:
            raise UsageError(
                f"a latency of {target} is met already",
                reason=f"one call takes {whole * 1e3:.3g} ms in {runtime}",
                hint="ask for less, or take the pass out",
            )

    def search(self, low: float, picked: Callable[[float], Sequence[int]]) -> float:
        """Return the share of the bitops whose allocation is as quick as asked.

        Args:
            low: The least share there is.
            picked: Share -> the places of its choices.

        Raises:
            UsageError: Even the least share takes longer.
        """
        times: dict[tuple[tuple[int, ...], bool], float] = {}

        def ratio(share: float, *, longer: bool = False) -> float:
            # Shares that are close have the same choices, and building them takes seconds.
            places = tuple(picked(share))
            if (places, longer) not in times:
                done = min(len(times) + 1, TRIES)
                self.context.progress("measuring latency", done, TRIES)
                times[places, longer] = self.watch.ratio(self.built(places), longer=longer)
            return times[places, longer]

        best = search(self.wanted, low, ratio, lambda share: ratio(share, longer=True))
        after = best.ratio * self.watch.seconds
        if best.ratio > self.wanted:
            raise UsageError(
                f"a latency of {self.target} cannot be met in {self.runtime}",
                reason=f"with the fewest bits everywhere a call takes {after * 1e3:.3g} ms, "
                f"{best.ratio:.1%} of the time",
                hint="allow fewer bits in `choices`, quantise `activations` too, select more "
                f"layers, or give at least {after * 1e3:.3g}ms",
            )
        self.context.measured["latency_ms"] = (self.watch.seconds * 1e3, after * 1e3)
        return best.share
