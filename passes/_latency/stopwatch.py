"""Time Programs against the one that is there, in torch or in a runtime."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from fxcompress.analysis import latency
from fxcompress.analysis.latency import Clock
from fxcompress.pipeline._probes import probes

if TYPE_CHECKING:
    from fxcompress.ir import Program

__all__ = ["Stopwatch"]

REPEATS: Final = (10, 60)
SECONDS: Final = 2.0
"""A measurement repeats calls for about so long, within these numbers of repeats."""

LONGER: Final = 4
"""How many times the repeats of a measurement another one has that confirms it."""


@dataclass
class Stopwatch:
    """Times Programs on one input, in turns with the one given.

    Times are lower quartiles: what else runs on the machine only ever adds to them. A runtime gets
    as many threads as torch has, and the artefacts that it opens are written to a folder that goes
    with the stopwatch.

    Attributes:
        program: The one given.
        runtime: Of `fxcompress.emit.RUNTIMES`; None times the graph in torch.
        repeats: How many calls a measurement times.
        seconds: Time of a call of the one given, as last measured.
    """

    program: Program
    runtime: str | None = None
    repeats: int = field(init=False)
    seconds: float = field(init=False)

    def __post_init__(self) -> None:
        self._written = 0
        if self.runtime is not None:
            self._folder = Path(tempfile.mkdtemp(prefix="fxcompress-latency-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        # With one thread the processor's time is the call's, whatever else runs on the machine.
        self._clock: Clock = "cpu" if torch.get_num_threads() == 1 else "wall"
        self._inputs = probes(self.program, 0)[0]
        self._original = self._call(self.program)
        alone = {"original": self._original}
        rough = self._time(alone, REPEATS[0])["original"]
        self.repeats = int(min(max(SECONDS / rough / 2, REPEATS[0]), REPEATS[1]))
        self.seconds = self._time(alone, self.repeats)["original"]

    def ratio(self, program: Program, *, longer: bool = False) -> float:
        """Return the time of a Program over that of the one given.

        Args:
            program: What is timed.
            longer: Measure several times as often, to confirm what a first measurement said.
        """
        calls = {"original": self._original, "result": self._call(program)}
        times = self._time(calls, self.repeats * (LONGER if longer else 1))
        self.seconds = times["original"]
        return times["result"] / times["original"]

    def _time(self, calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
        with torch.no_grad():
            found = latency(calls, repeats=repeats, clock=self._clock)
        return {name: each.lower_quartile_ms / 1e3 for name, each in found.items()}

    def _call(self, program: Program) -> Callable[[], object]:
        """Return a call of the graph alone, without packing of inputs and outputs."""
        if self.runtime is not None:
            return self._opened(program)
        from torch.fx.graph import CodeGen

        flat = program.copy().module.eval()
        flat.graph.set_codegen(CodeGen())
        flat.recompile()
        return lambda: flat(*self._inputs)

    def _opened(self, program: Program) -> Callable[[], object]:
        """Return a call of what the runtime opens."""
        from fxcompress.emit import RUNTIMES

        runtime = RUNTIMES[str(self.runtime)]
        self._written += 1
        path = runtime.write(program, self._folder / str(self._written))
        return runtime.caller(path, program, self._inputs, torch.get_num_threads())
