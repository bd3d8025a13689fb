"""What follows the passes of a run: artefacts, latency, constraints, report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxcompress.errors import UsageError

if TYPE_CHECKING:
    from fxcompress.analysis import Latency
    from fxcompress.api import Result
    from fxcompress.emit import Artifact, EmitOptions
    from fxcompress.ir import Program
    from fxcompress.spec import ConstraintResult, Figures, Spec

__all__ = ["Finished", "emit_all", "finish", "measure_latency"]


@dataclass(frozen=True)
class Finished:
    """What was made of a result.

    Attributes:
        artifacts: What was emitted.
        constraints: The spec's constraints against what was measured.
        report: The files of the report: JSON, HTML, Markdown.
    """

    artifacts: tuple[Artifact, ...]
    constraints: tuple[ConstraintResult, ...]
    report: tuple[Path, ...]

    @property
    def missed(self) -> bool:
        """Whether a constraint is not met."""
        return any(each.met is False for each in self.constraints)


def finish(result: Result, spec: Spec, folder: Path) -> Finished:
    """Emit what the spec asks for, check its constraints, and write the report.

    Raises:
        EmitError: An artefact cannot be written or does not reload equal.
        RunFolderError: The report cannot be written.
    """
    from fxcompress.report import write_report
    from fxcompress.spec import check_constraints

    artifacts = emit_all(result, spec, folder / "artifacts")
    figures = _figures(result, spec)
    constraints = tuple(check_constraints(spec.constraints, figures))
    report = result.build_report(constraints=constraints, artifacts=artifacts)
    return Finished(artifacts, constraints, write_report(report, folder))


def emit_all(result: Result, spec: Spec, folder: Path) -> tuple[Artifact, ...]:
    """Write every artefact of the spec; those of one name are proved together."""
    from fxcompress.emit import EmitOptions

    made: list[Artifact] = []
    stems = dict.fromkeys(item.stem for item in spec.emit)
    for stem in stems:
        items = [item for item in spec.emit if item.stem == stem]
        said = {item.use: item.model_dump(exclude={"use", "stem", "exits"}) for item in items}
        extra = {use: values for use, values in said.items() if values}
        options = EmitOptions.model_validate({"stem": stem, "seed": spec.seed, **extra})
        made.extend(result.emit(folder, [item.use for item in items], options=options))
        if each := [item.use for item in items if item.exits]:
            made.extend(_emit_exits(result.program, folder, each, options))
    return tuple(made)


def _emit_exits(
    program: Program, folder: Path, formats: Sequence[str], options: EmitOptions
) -> Iterator[Artifact]:
    """Write the model that always stops at an early exit, for each of them."""
    from fxcompress.emit import emit
    from fxcompress.rewrite import at_exit, early_exits
    from fxcompress.train.joint.agree import main_place

    exits = early_exits(program)
    if not exits:
        raise UsageError(
            "there are no early exits to emit",
            reason="`emit` says `exits: true`",
            hint="put `use: depth.early_exit` among the passes, or take `exits` out",
        )
    place = main_place(program) or 0
    for each in exits:
        own = options.model_copy(update={"stem": f"{options.stem}.{each.name}"})
        yield from emit(at_exit(program, each.name, place), folder, formats, options=own)


def _figures(result: Result, spec: Spec) -> Figures:
    """Return what was measured; latency only where the spec limits it."""
    figures = result.figures()
    if spec.constraints.latency is None:
        return figures
    times = measure_latency(result.original, result.program, seed=spec.seed)
    original, now = (times[name].median_ms / 1000 for name in ("original", "result"))
    return replace(
        figures,
        original={**figures.original, "latency": original},
        result={**figures.result, "latency": now},
    )


def measure_latency(
    original: Program,
    result: Program,
    *,
    batch: int | None = None,
    seed: int = 0,
    repeats: int = 20,
) -> dict[str, Latency]:
    """Time the original and the result on one random input, taking turns.

    Args:
        original: The Program before.
        result: The Program after.
        batch: Size of the dynamic dim called `batch`; as captured where not given.
        seed: Seed of the input.
        repeats: How often each is timed.
    """
    import torch

    from fxcompress.analysis import latency
    from fxcompress.testing import hash_inputs

    dims = {"batch": batch} if batch and "batch" in original.dims else None
    inputs = list(hash_inputs(original, dims, seed).values())
    calls = {"original": _caller(original, inputs), "result": _caller(result, inputs)}
    with torch.no_grad():
        return latency(calls, repeats=repeats)


def _caller(program: Program, inputs: Sequence[Any]) -> Callable[[], object]:
    """Return a call of a program's graph on one tensor per placeholder."""
    from torch.fx.graph import CodeGen

    flat = program.copy().module.eval()
    flat.graph.set_codegen(CodeGen())
    flat.recompile()
    return lambda: flat(*inputs)
