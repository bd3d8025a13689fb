"""Emit a program: write every format, reload all in a fresh process, then publish."""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fxcompress.emit._artifact import Artifact, Written, digest, inside, publish, staging
from fxcompress.emit._bounds import bounded
from fxcompress.emit._fresh import Claim, Expected, verify
from fxcompress.emit._job import Format, Job
from fxcompress.emit._lower import is_quantized
from fxcompress.emit._plain import PlainProgram, plain_program
from fxcompress.emit._probes import Leaves, probes
from fxcompress.emit._tolerance import Tolerances
from fxcompress.emit.options import FORMATS, EmitOptions
from fxcompress.emit.pt2 import DECOMPOSED_IMPORT
from fxcompress.errors import EmitError, FxCompressError, NumericsError, UsageError
from fxcompress.ir.program import Program

__all__ = ["emit", "write_unproved"]


def emit(
    program: Program,
    directory: str | Path,
    formats: Sequence[str],
    *,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    options: EmitOptions | None = None,
) -> tuple[Artifact, ...]:
    """Write `program` in every format asked for, and prove each by reloading it.

    Files are written to a hidden folder inside `directory`, loaded and run there by a fresh
    process on seeded inputs of two sizes, compared with the program in memory, and only then
    moved to their names. When anything fails nothing is published.

    Args:
        program: What to write. It is written as it computes in eval mode.
        directory: The output folder; made if it is not there.
        formats: Of `FORMATS`.
        example_inputs: A batch to compare on: a tuple of positional or a mapping of keyword
            arguments. Random inputs otherwise.
        options: File names and options per format.

    Raises:
        UsageError: An unknown or repeated format.
        MissingExtraError: A format needs a package that is not installed.
        EmitError: A format cannot be written, or computes something else after reloading.
        NumericsError: The program itself returns a NaN or an infinity on the inputs.
    """
    options = options or EmitOptions()
    _check_formats(formats)
    directory = Path(directory)
    _check_data(program)
    plain = plain_program(program)
    dims = bounded(program.dims, options.executorch) if "executorch" in formats else program.dims
    leaves = probes(program, example_inputs, options.seed, dims)
    calls = _expected(program, plain, leaves)
    quantized = is_quantized(plain.module)
    with staging(directory) as stage:
        job = Job(program, stage, options, leaves[0], quantized)
        written: dict[str, tuple[Written, float]] = {}
        for name in formats:
            started = time.perf_counter()
            done = _write(name, job)
            for file in done.files:
                inside(directory, file)
            written[name] = done, time.perf_counter() - started
        started = time.perf_counter()
        allowed = Tolerances(job, plain, calls)
        claims = [_claim(name, job, done, allowed) for name, (done, _) in written.items()]
        comparisons = verify(claims, calls, options.timeout)
        shared = (time.perf_counter() - started) / max(len(claims), 1)
        return tuple(
            _publish(name, job, directory, done, comparisons[name], seconds + shared)
            for name, (done, seconds) in written.items()
        )


def write_unproved(program: Program, directory: Path, name: str) -> None:
    """Write one format into a folder without comparing anything: for timing alone.

    Raises:
        MissingExtraError: The format needs a package that is not installed.
        EmitError: It cannot be written.
    """
    _check_data(program)
    directory.mkdir(parents=True, exist_ok=True)
    options = EmitOptions()
    plain = plain_program(program)
    dims = bounded(program.dims, options.executorch) if name == "executorch" else program.dims
    leaves = probes(program, None, options.seed, dims)
    _write(name, Job(program, directory, options, leaves[0], is_quantized(plain.module)))


def _check_formats(formats: Sequence[str]) -> None:
    for name in formats:
        if name not in FORMATS:
            raise UsageError(
                f"there is no output format {name!r}",
                reason=f"the formats are {', '.join(FORMATS)}",
            )
    repeated = [name for name in FORMATS if list(formats).count(name) > 1]
    if repeated:
        raise UsageError(f"the output format {repeated[0]!r} is given twice")


def _check_data(program: Program) -> None:
    missing = [name for name, tensor in program.state().items() if tensor.is_meta]
    if missing:
        raise EmitError(
            f"{missing[0]} has no data",
            reason=f"{len(missing)} tensors of the program are on the meta device",
            hint="load weights before emitting",
            where=missing[0],
        )


def _write(name: str, job: Job) -> Written:
    module: Format = importlib.import_module(f"fxcompress.emit.{name}")  # type: ignore[assignment]
    try:
        return module.write(job)
    except (FxCompressError, OSError):
        raise
    except Exception as error:
        raise EmitError(
            f"the {name} artefact cannot be written",
            reason=f"{type(error).__name__}: {error}",
            where=str(job.stage.parent),
        ) from error


def _expected(program: Program, plain: PlainProgram, leaves: Sequence[Leaves]) -> list[Expected]:
    calls = []
    for values in leaves:
        call = plain.call(values)
        with torch.no_grad():
            output = plain.module(*call.args, **call.kwargs)
        flat = torch.utils._pytree.tree_leaves(output)
        outputs = {
            name: leaf.detach()
            for name, leaf in zip(plain.outputs, flat, strict=True)
            if isinstance(leaf, torch.Tensor)
        }
        _check_finite(outputs)
        names = (tensor.name for tensor in program.signature.inputs)
        calls.append(Expected(dict(zip(names, values, strict=True)), *_parts(call), outputs))
    return calls


def _parts(call: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return call.args, call.kwargs


def _check_finite(outputs: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in outputs.items():
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise NumericsError(
                f"the program returns NaN in {name!r} on the inputs for the comparison",
                reason="an artefact cannot be proved equal to it",
                hint="give real example inputs, or find the pass after which the NaN appears",
            )


def _claim(name: str, job: Job, done: Written, allowed: Tolerances) -> Claim:
    decomposed = job.quantized and job.options.pt2.quantized == "decomposed"
    imports = (DECOMPOSED_IMPORT,) if name == "pt2" and decomposed else ()
    paths = tuple(job.stage / file for file in done.files)
    return Claim(name, paths, allowed.of(name), imports)


def _publish(
    name: str, job: Job, directory: Path, done: Written, comparison: Any, seconds: float
) -> Artifact:
    sizes = {file: (job.stage / file).stat().st_size for file in done.files}
    hashes = {file: digest(job.stage / file) for file in done.files}
    return Artifact(
        format=name,
        paths=publish(job.stage, directory, done.files),
        bytes=sum(sizes.values()),
        sha256=hashes,
        comparison=comparison,
        seconds=seconds,
        notes=done.notes,
    )
