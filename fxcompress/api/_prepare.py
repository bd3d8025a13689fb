"""From a recipe, a spec or passes composed in code, to a Job."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from fxcompress.api._job import Job
from fxcompress.errors import UsageError
from fxcompress.ir import Program
from fxcompress.pipeline import Context, Step
from fxcompress.pipeline._failure import absolute
from fxcompress.spec import Spec, load_data, load_metric, load_program, parse_steps

if TYPE_CHECKING:
    from fxcompress.train.metrics import Metric

__all__ = ["Recipe", "prepare"]

Recipe: TypeAlias = Spec | Sequence[Step | Mapping[str, Any]]
"""A spec, or steps: what `passes` makes, mappings as in a spec, or checked Steps."""


def prepare(
    recipe: Recipe,
    program: Program | None = None,
    *,
    data: Mapping[str, Iterable[Any]] | None = None,
    metric: Metric | None = None,
    seed: int | None = None,
    teacher: Program | None = None,
    meta: bool = False,
) -> Job:
    """Make the Job of a recipe: capture a spec's model, load its data and metric, check steps.

    Args:
        recipe: A spec or passes.
        program: The original; a spec's own model if None.
        data: Replaces a spec's data.
        metric: Replaces a spec's metric.
        seed: Replaces a spec's seed.
        teacher: What `teacher: given` stands for.
        meta: Allocate no weights where the spec's model is built (for plans).

    Raises:
        FxCompressError: The recipe is not valid, or what it names cannot be loaded.
    """
    if not isinstance(recipe, Spec):
        if program is None:
            raise UsageError("passes alone name no model", hint="give a Program, or a Spec")
        context = Context(
            data=data or {}, seed=seed or 0, name=program.name, metric=metric, teacher=teacher
        )
        return Job(program, _steps(recipe), context)
    spec = recipe
    context = Context(
        data=load_data(spec) if data is None else data,
        seed=spec.seed if seed is None else seed,
        name=spec.title,
        spec=spec.digest,
        folder=spec.folder,
        metric=load_metric(spec) if metric is None else metric,
        reproduce=_named_by(spec),
        teacher=teacher,
    )
    original = load_program(spec, meta=meta) if program is None else program
    source = str(spec.files[0]) if spec.files else ""
    return Job(original, spec.steps, context, spec, source, owned=program is None)


def _steps(recipe: Sequence[Step | Mapping[str, Any]]) -> tuple[Step, ...]:
    """Return checked steps, those that are checked already in their places."""
    parsed = iter(parse_steps([each for each in recipe if not isinstance(each, Step)]))
    return tuple(each if isinstance(each, Step) else next(parsed) for each in recipe)


def _named_by(spec: Spec) -> dict[str, Any]:
    """Return the entries of a spec that a failing pass needs again, with paths made absolute."""
    plain = spec.plain()
    return {key: absolute(plain[key], spec.folder) for key in ("data", "metric") if key in plain}
