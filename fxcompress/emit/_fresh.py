"""Load artefacts again in a fresh process, run them, and compare with the program in memory."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxcompress.analysis.compare import OutputComparison, compare
from fxcompress.errors import EmitError

__all__ = ["Claim", "Expected", "Tolerance", "verify"]

_CHILD = Path(__file__).with_name("_child.py")
_TAIL = 20


@dataclass(frozen=True)
class Tolerance:
    """What is demanded: max |Δ| over the range of each output, and the cosine of all of them."""

    relative: float
    cosine: float = 0.0


@dataclass(frozen=True)
class Claim:
    """An artefact that should compute what the program computes."""

    format: str
    paths: tuple[Path, ...]
    tolerance: Tolerance
    imports: tuple[str, ...] = ()


@dataclass(frozen=True)
class Expected:
    """One call, in the form that artefacts take it, and the tensors it must return by name."""

    leaves: Mapping[str, torch.Tensor]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: Mapping[str, torch.Tensor]


def verify(
    claims: Sequence[Claim], calls: Sequence[Expected], timeout: float
) -> dict[str, OutputComparison]:
    """Return by format how far the reloaded artefacts are from the program, the worst call each.

    Raises:
        EmitError: An artefact does not load, crashes its process, takes too long, or differs.
    """
    with tempfile.TemporaryDirectory(prefix="fxcompress-fresh-") as name:
        folder = Path(name)
        _write_job(folder, claims, calls)
        failure = _run(folder, timeout)
        found = {}
        for claim in claims:
            result = folder / f"{claim.format}.pt"
            if not result.exists():
                raise failure or _missing(claim)
            found[claim.format] = _check(claim, calls, torch.load(result, weights_only=True))
        if failure is not None:
            raise failure
    return found


def _write_job(folder: Path, claims: Sequence[Claim], calls: Sequence[Expected]) -> None:
    artefacts = [
        {
            "format": claim.format,
            "paths": [str(path.resolve()) for path in claim.paths],
            "imports": claim.imports,
        }
        for claim in claims
    ]
    (folder / "job.json").write_text(json.dumps({"artefacts": artefacts}))
    plain = [
        {"leaves": dict(call.leaves), "args": call.args, "kwargs": dict(call.kwargs)}
        for call in calls
    ]
    torch.save(plain, folder / "calls.pt")


def _run(folder: Path, timeout: float) -> EmitError | None:
    """Run the child; return what ended it early, if anything did."""
    # -P keeps this folder, whose onnx.py would hide the package onnx, off the child's path.
    command = [sys.executable, "-P", "-W", "ignore", str(_CHILD), str(folder)]
    with (folder / "stderr").open("w+b") as stderr:
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            return EmitError(
                "the artefacts took too long to reload and run in a fresh process",
                reason=f"not done after {timeout:g} s; {_tail(folder)}",
                hint="raise the emit option `timeout`",
            )
    if done.returncode == 0:
        return None
    ended = f"exit code {done.returncode}"
    if done.returncode < 0:
        ended = f"signal {signal.Signals(-done.returncode).name}"
    return EmitError(
        "the fresh process that reloads the artefacts died",
        reason=f"{ended}; {_tail(folder)}",
        hint="SIGKILL is often a lack of memory; anything else is worth a bug report",
    )


def _tail(folder: Path) -> str:
    lines = (folder / "stderr").read_text(errors="replace").strip().splitlines()
    return "its last words: " + "\n    ".join(lines[-_TAIL:]) if lines else "it printed nothing"


def _missing(claim: Claim) -> EmitError:
    return EmitError(f"the {claim.format} artefact was not run", where=claim.paths[0].name)


def _check(claim: Claim, calls: Sequence[Expected], result: Mapping[str, Any]) -> OutputComparison:
    where = claim.paths[0].name
    if "error" in result:
        lines = str(result["error"]).strip().splitlines()
        raise EmitError(
            f"the {claim.format} artefact does not load and run in a fresh process",
            reason="\n    ".join(lines[-_TAIL:]),
            where=where,
        )
    worst: OutputComparison | None = None
    for call, tensors in zip(calls, result["outputs"], strict=True):
        comparison = _compare(claim, call, tensors)
        if worst is None or _distance(comparison) > _distance(worst):
            worst = comparison
    assert worst is not None, "there is at least one call"
    return worst


def _distance(comparison: OutputComparison) -> float:
    return comparison.relative if comparison.finite else float("inf")


def _compare(claim: Claim, call: Expected, tensors: Sequence[torch.Tensor]) -> OutputComparison:
    where = claim.paths[0].name
    sizes = ", ".join(f"{name} {list(t.shape)}" for name, t in call.leaves.items())
    if len(tensors) != len(call.outputs):
        raise EmitError(
            f"the {claim.format} artefact returns {len(tensors)} tensors, not {len(call.outputs)}",
            where=where,
        )
    for (name, wanted), tensor in zip(call.outputs.items(), tensors, strict=True):
        if tensor.dtype is not wanted.dtype or tensor.shape != wanted.shape:
            raise EmitError(
                f"output {name!r} of the {claim.format} artefact has another type",
                reason=f"{tensor.dtype} {list(tensor.shape)} instead of "
                f"{wanted.dtype} {list(wanted.shape)}, on {sizes}",
                where=where,
            )
    found = compare(dict(call.outputs), dict(zip(call.outputs, tensors, strict=True)))
    parts = {name.strip("[]'\""): part for name, part in found.outputs.items()}
    for name, part in (parts or {next(iter(call.outputs), "output"): found}).items():
        limit = claim.tolerance
        if not part.finite or part.relative > limit.relative or part.cosine < limit.cosine:
            raise EmitError(
                f"output {name!r} of the {claim.format} artefact differs from the program's",
                reason=f"max |Δ| is {part.max_abs:.3g}, {part.relative:.2%} of the output's range "
                f"(at most {limit.relative:.2%} is allowed), cosine {part.cosine:.6f}, on {sizes}",
                hint="the artefact is not published; please report the model",
                where=where,
            )
    return found
