"""`fxcompress run`: the main job."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import rich_click as click

from fxcompress.cli._command import SILENT, Outcome, document_options, emits, existing, overrides
from fxcompress.errors import UsageError

if TYPE_CHECKING:
    from fxcompress.api import Result
    from fxcompress.cli._finish import Finished
    from fxcompress.pipeline.records import PassRecord
    from fxcompress.spec import Spec

__all__ = ["command"]

_LINES: Final = 8
# What the user's own selection leaves out need not be told again.
_UNSELECTED: Final = "it is not selected"


@click.command("run")
@existing("spec", metavar="SPEC|PLAN.JSON")
@overrides
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="The run folder; by default runs/NAME."
)
@click.option("--resume", is_flag=True, help="Go on after the last complete checkpoint.")
@click.option("--overwrite", "--force", is_flag=True, help="Throw away the run in the folder.")
@click.option("--locked", is_flag=True, help="Replay the lock beside the spec; refuse any drift.")
@click.option(
    "--lock",
    "lock_file",
    type=click.Path(path_type=Path),
    help="The lock to replay, or a folder with one; implies --locked.",
)
@click.option("--write-lock", is_flag=True, help="Keep the new lock beside the spec too.")
@document_options
@emits
def command(
    spec: Path,
    overrides: Sequence[str],
    output: Path | None,
    resume: bool,
    overwrite: bool,
    locked: bool,
    lock_file: Path | None,
    write_lock: bool,
) -> Outcome:
    """Compress the model as the spec says: apply and prove every pass, emit, report.

    The run folder keeps a checkpoint after every pass, so that a killed run can be resumed, the
    lock, the artefacts and the report. Given a plan, the run must decide what was planned.

    Started in several processes by `accelerate launch` or `torchrun`, training shares its batches
    among them; the first process alone writes and prints.
    """
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    from fxcompress.cli._progress import showing_steps, working
    from fxcompress.cli._specs import spec_or_plan

    loaded, plan = spec_or_plan(spec, overrides)
    folder = output or Path(loaded.output or f"runs/{loaded.title}")
    from fxcompress.api import prepare
    from fxcompress.cli._finish import finish
    from fxcompress.pipeline import Lock, RunFolder
    from fxcompress.train import joined

    locked_by = lock_file or (loaded.folder if locked else None)
    lock = None if locked_by is None else Lock.load(locked_by)
    with joined() as world, ExitStack() as stack:
        if world.rank:
            prepare(loaded).run(folder, lock=lock, plan=plan)
            return SILENT
        opened = stack.enter_context(RunFolder(folder, resume=resume, overwrite=overwrite))
        with working("capturing the model"):
            job = prepare(loaded)
        with showing_steps() as listener:
            result = job.run(
                opened,
                lock=lock,
                plan=plan,
                resume=resume,
                overwrite=overwrite,
                on_event=listener,
            )
        with working("emitting and proving the artefacts"):
            finished = finish(result, loaded, folder)
    if write_lock:
        result.lock.save(loaded.folder)
    text = _text(result, loaded, folder, finished)
    return Outcome(text, _document(result, folder, finished), 4 if finished.missed else 0)


def _text(result: Result, spec: Spec, folder: Path, finished: Finished) -> str:
    """Return the summary of a run: passes, constraints, artefacts, where the report is."""
    record = result.record
    lines = [f"{record.name}: {len(record.passes)} passes applied and proved"]
    for each in record.passes:
        error = each.to_original.relative if each.to_original else None
        shown = "" if error is None else f"   error {error:.1e}"
        metric = "" if each.metric is None else f"   {record.metric_name} {each.metric:.4g}"
        lines.append(
            f"  {each.index} {each.id:<16} {each.proof.grade:<9} "
            f"{_change(record.original.bytes, each.after.bytes)}{shown}{metric}"
        )
        lines += [f"      {line}" for line in _told(each)]
    for reason in dict.fromkeys(record.stopped.values()):
        left = [step for step, why in record.stopped.items() if why == reason]
        lines.append(f"  without {left[0]} to {left[-1]}: {reason}")
    if record.original_metric is not None:
        lines.append(f"  original {record.metric_name} {record.original_metric:.4g}")
    signs = {True: "✓", False: "✗", None: "?"}
    lines.extend(f"  {signs[each.met]} {each}" for each in finished.constraints)
    for artifact in finished.artifacts:
        lines.append(
            f"  {artifact.format:<8} {artifact.path}   {artifact.bytes:,} bytes, "
            f"reloaded with error {artifact.comparison.relative:.1e}"
        )
    lines.append(f"report: {next(path for path in finished.report if path.suffix == '.html')}")
    return "\n".join(lines)


def _told(record: PassRecord) -> list[str]:
    """Return what a pass says that it did, and why it left alone what it did not touch."""
    lines = list(record.summary)
    if len(lines) > _LINES:
        lines[_LINES - 1 :] = [f"and {len(lines) - _LINES + 1} more lines in the report"]
    reasons = dict.fromkeys(each.reason for each in record.declined)
    for reason in [each for each in reasons if each != _UNSELECTED][:_LINES]:
        nodes = [each.node for each in record.declined if each.reason == reason]
        more = f" and {len(nodes) - 1} more" if nodes[1:] else ""
        lines.append(f"skipped {nodes[0]}{more}: {reason}")
    return lines


def _change(before: int, after: int) -> str:
    share = f" ({after / before:.1%} of the original)" if before else ""
    return f"{after:,} bytes{share}"


def _document(result: Result, folder: Path, finished: Finished) -> dict[str, Any]:
    record = result.record.model_dump(mode="json", exclude={"format_version"})
    return {
        "folder": str(folder),
        "record": record,
        "constraints": [
            {
                "name": each.name,
                "limit": each.limit,
                "relation": each.relation,
                "bound": each.bound,
                "value": each.value,
                "met": each.met,
            }
            for each in finished.constraints
        ],
        "artifacts": [artifact.model_dump(mode="json") for artifact in finished.artifacts],
        "report": [str(path) for path in finished.report],
    }
