"""Latency of a run's artefacts against its original, both in the same runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fxcompress.errors import UsageError

if TYPE_CHECKING:
    from fxcompress.analysis import Latency
    from fxcompress.ir import Program

__all__ = ["choose_runtimes", "measure_runtime"]


def choose_runtimes(run: Path, asked: Sequence[str]) -> tuple[str, ...]:
    """Return the runtimes to measure in: those asked for, or torch and all that can be.

    Raises:
        UsageError: The run has no artefact of a runtime that is asked for.
        MissingExtraError: A package of such a runtime is not installed.
    """
    from fxcompress.emit import RUNTIMES

    folder = run / "artifacts"
    if not asked:
        found = [r.name for r in RUNTIMES.values() if r.available() and r.artefact(folder)]
        return ("torch", *found)
    for name in asked:
        runtime = RUNTIMES.get(name)
        if runtime is None:
            continue
        runtime.need()
        if runtime.artefact(folder) is None:
            raise UsageError(
                f"the run emitted nothing that {name} opens",
                reason=f"there is no *{runtime.ending} in {folder}",
                hint=f"add `{runtime.format}` to `emit` of the spec and run it again",
            )
    return tuple(dict.fromkeys(asked))


def measure_runtime(
    name: str, run: Path, original: Program, *, batch: int | None = None, repeats: int = 20
) -> dict[str, Latency]:
    """Time a run's artefact and the original, emitted for the same runtime, taking turns.

    Args:
        name: Of `RUNTIMES`.
        run: The folder of the run.
        original: Its Program before.
        batch: Size of the dynamic dim called `batch`; as captured where not given.
        repeats: How often each is timed.
    """
    import torch

    from fxcompress.analysis import latency
    from fxcompress.emit import RUNTIMES, emit
    from fxcompress.testing import hash_inputs

    runtime = RUNTIMES[name]
    path = runtime.artefact(run / "artifacts")
    assert path is not None, "runtimes are chosen by their artefacts"
    dims = {"batch": batch} if batch and "batch" in original.dims else None
    leaves = list(hash_inputs(original, dims).values())
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="fxcompress-bench-") as folder, torch.no_grad():
        (exported,) = emit(original, folder, [runtime.format])
        files = {"original": exported.path, "result": path}
        calls = {
            key: runtime.caller(file, original, leaves, threads) for key, file in files.items()
        }
        return latency(calls, repeats=repeats)
