"""A spec's original and its result as files, timed in turns in eager PyTorch and onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks._common import interleaved
from benchmarks._onnxruntime import session
from fxcompress.emit import eager_module
from fxcompress.emit.driver import write_unproved
from fxcompress.ir import Program
from fxcompress.spec import Spec, load_program

__all__ = ["FORMATS", "Timing", "call_of", "call_of_program", "originals", "timings"]

FORMATS = {"pt2": "torch.export file", "onnx": "onnxruntime"}
Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Timing:
    """CPU time of an input in milliseconds: the original's, ours, and the median ratio."""

    original: float
    ours: float
    ratio: float


def originals(spec: Spec, folder: Path) -> Mapping[str, Path]:
    """Write the model before the first pass in every format."""
    program = load_program(spec)
    for name in FORMATS:
        write_unproved(program, folder, name)
    return {name: folder / f"model.{name}" for name in FORMATS}


def call_of(path: Path) -> Call:
    """Return a function that runs a file on one tensor, on one thread."""
    torch.set_num_threads(1)
    if path.suffix == ".pt2":
        module = torch.export.load(path).module()

        def run(x: Tensor) -> Tensor:
            with torch.inference_mode():
                found: Tensor = module(x)
            return found

        return run
    made = session(path)
    (name,) = (each.name for each in made.get_inputs())
    return lambda x: torch.from_numpy(made.run(None, {name: x.numpy()})[0])


def call_of_program(program: Program) -> Call:
    """Return a function that runs a Program in eager PyTorch, on one thread."""
    torch.set_num_threads(1)
    module = eager_module(program)

    def run(x: Tensor) -> Tensor:
        with torch.inference_mode():
            found: Tensor = module(x)
        return found

    return run


def timings(
    calls: Mapping[str, Call], inputs: Sequence[Tensor], repeats: int
) -> Mapping[str, Timing]:
    """Time all calls on the same inputs in turns; each turn runs all of them.

    Args:
        calls: By name; the first is what others are compared with.
        inputs: What a turn runs, one after the other.
        repeats: Turns.
    """

    def over(call: Call) -> Callable[[], Any]:
        return lambda: [call(x) for x in inputs]

    times = interleaved({name: over(call) for name, call in calls.items()}, repeats)
    first = next(iter(calls))
    share = 1000 / len(inputs)
    return {
        name: Timing(
            median(times[first]) * share,
            median(own) * share,
            median(a / b for a, b in zip(times[first], own, strict=True)),
        )
        for name, own in times.items()
    }
