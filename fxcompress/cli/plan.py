"""`fxcompress plan`: what a spec would do, without doing it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import rich_click as click

from fxcompress.cli._command import Outcome, document_options, emits, existing, overrides

__all__ = ["command"]


@click.command("plan")
@existing("spec")
@overrides
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Keep the plan, for `run`.")
@click.option("-v", "--verbose", is_flag=True, help="Show every change, not the first few.")
@click.option("--meta", is_flag=True, help="Load no weights: for models larger than the memory.")
@document_options
@emits
def command(
    spec: Path, overrides: Sequence[str], output: Path | None, verbose: bool, meta: bool
) -> Outcome:
    """Capture the model, decide what can be decided, and print the change per module.

    Nothing is run and nothing is kept. What only data can tell is shown as known later.
    """
    from fxcompress.cli._progress import showing_steps, working
    from fxcompress.spec import Spec

    loaded = Spec.load(spec, overrides)
    from fxcompress.api import prepare
    from fxcompress.pipeline import render_plan

    with working("capturing the model"):
        job = prepare(loaded, meta=meta)
    with showing_steps() as listener:
        plan = job.plan(on_event=listener)
    text = render_plan(plan, verbose=verbose)
    if output is not None:
        plan.save(output)
        text.append(f"Do exactly this: fxcompress run {output}\n")
    last = plan.steps[-1].limits if plan.steps else ()
    missed = any(limit.met is False for limit in last)
    document = plan.model_dump(mode="json", exclude={"format_version"})
    return Outcome(text, document, 4 if missed else 0)
