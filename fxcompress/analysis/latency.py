"""Latency of several callables, measured fairly: interleaved, warmed up, with their spread."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict

__all__ = ["Latency", "latency"]

Clock = Literal["wall", "cpu"]
_CLOCKS: Mapping[Clock, Callable[[], int]] = {
    "wall": time.perf_counter_ns,
    "cpu": time.process_time_ns,
}


class Latency(BaseModel):
    """Times of one callable, in milliseconds: median, quartiles and the number of repeats."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    median_ms: float
    lower_quartile_ms: float
    upper_quartile_ms: float
    repeats: int
    clock: Clock = "wall"

    @property
    def spread(self) -> float:
        """Interquartile range over the median: 0.1 says that half the runs lie within ±5 %."""
        return (self.upper_quartile_ms - self.lower_quartile_ms) / self.median_ms


def latency(
    callables: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 20,
    warmup: int = 3,
    clock: Clock = "wall",
) -> dict[str, Latency]:
    """Time each callable `repeats` times, taking turns, so that a drift of the machine hits all.

    The order is reversed every other round, and the garbage collector rests while a round runs.

    Raises:
        ValueError: `repeats` is below 2 or `warmup` below 0.
    """
    if repeats < 2 or warmup < 0:
        raise ValueError("latency needs repeats >= 2 and warmup >= 0")
    now = _CLOCKS[clock]
    for _ in range(warmup):
        for call in callables.values():
            call()
    samples: dict[str, list[float]] = {name: [] for name in callables}
    collected = gc.isenabled()
    gc.disable()
    try:
        order = list(callables.items())
        for round_ in range(repeats):
            for name, call in order if round_ % 2 == 0 else reversed(order):
                start = now()
                call()
                samples[name].append((now() - start) / 1e6)
            gc.collect(0)
    finally:
        if collected:
            gc.enable()
    return {name: _summary(times, clock) for name, times in samples.items()}


def _summary(times: list[float], clock: Clock) -> Latency:
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
    return Latency(
        median_ms=median,
        lower_quartile_ms=lower,
        upper_quartile_ms=upper,
        repeats=len(times),
        clock=clock,
    )
