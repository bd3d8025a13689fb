"""The Python API: compress a Program by a spec, or by passes composed in code.

import fxcompress as fxc

program = fxc.capture(model, (x,))
result = fxc.compress(program, fxc.Spec.load("spec.yaml"))
result = fxc.compress(
    program,
    [fxc.passes.tidy.fold_batchnorm(), {"use": "quantize.static", "calibration": 64}],
    data={"calibration": batches},
)
result.emit("out/", ["pt2", "onnx"])
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxcompress._pass_factories import PassFactories
from fxcompress.api._job import Job
from fxcompress.api._prepare import Recipe, prepare
from fxcompress.api._result import Result
from fxcompress.ir import Program
from fxcompress.pipeline import Lock, RunFolder

if TYPE_CHECKING:
    from fxcompress.pipeline.steps import OnEvent
    from fxcompress.train.metrics import Metric

__all__ = ["Job", "Result", "compress", "passes", "prepare"]

passes = PassFactories()
"""Every installed pass as a function of its options: `passes.quantize.static(bits=8)`."""


def compress(
    program: Program,
    recipe: Recipe,
    *,
    data: Mapping[str, Iterable[Any]] | None = None,
    metric: Metric | None = None,
    seed: int | None = None,
    teacher: Program | None = None,
    run_dir: str | Path | RunFolder | None = None,
    lock: Lock | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_event: OnEvent | None = None,
) -> Result:
    """Compress a Program; it is not changed.

    Args:
        program: What `capture` returned.
        recipe: A spec (its `model` is not built: `program` stands for it), or passes.
        data: Split name -> re-iterable of batches; a batch is a tuple of positional or a mapping
            of keyword arguments, and labelled splits give `(batch, target)`. Replaces a spec's.
        metric: What results are judged by. Replaces a spec's.
        seed: Replaces a spec's; 0 by default.
        teacher: The Program that `teacher: given` stands for in a distillation.
        run_dir: Where to keep checkpoints, lock and record; nowhere if None.
        lock: Replay these decisions.
        resume: Go on with the run in `run_dir`.
        overwrite: Throw away the run in `run_dir`.
        on_event: Told of every step.

    Raises:
        FxCompressError: The recipe is not valid, or a check, a pass or the run folder failed.
    """
    job = prepare(recipe, program, data=data, metric=metric, seed=seed, teacher=teacher)
    return job.run(run_dir, lock=lock, resume=resume, overwrite=overwrite, on_event=on_event)
