"""Run a pipeline: pass by pass, proved, checkpointed, resumable."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxcompress._files import write_text
from fxcompress.analysis import cost
from fxcompress.errors import LockError, ModelError, RunFolderError
from fxcompress.pipeline import _failure
from fxcompress.pipeline._identity import Identity
from fxcompress.pipeline._probing import Probing
from fxcompress.pipeline._step import Applied, StepRunner
from fxcompress.pipeline.checkpoints import Checkpoints
from fxcompress.pipeline.lock import Lock, data_now
from fxcompress.pipeline.proofs import Digests, check_finite, has_values
from fxcompress.pipeline.records import RunRecord
from fxcompress.pipeline.rounds import (
    Stop,
    can_be_undone,
    check_metric,
    earlier,
    expanded,
    stop_of,
    without,
)
from fxcompress.pipeline.run_folder import RunFolder
from fxcompress.pipeline.steps import Event, OnEvent, Pipeline, Step

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.pipeline.plans import Plan

__all__ = ["Execution", "execute"]


@dataclass(frozen=True)
class Execution:
    """What a run came to.

    Attributes:
        original: The Program given.
        program: The Program after the last pass.
        record: What every pass did.
        lock: Every decision, and hashes of what they were made from.
        folder: The run folder, or None.
    """

    original: Program
    program: Program
    record: RunRecord
    lock: Lock
    folder: Path | None = None


def execute(
    program: Program,
    steps: Sequence[Step],
    context: Context,
    run_dir: str | Path | RunFolder | None = None,
    *,
    lock: Lock | None = None,
    plan: Plan | None = None,
    resume: bool = False,
    overwrite: bool = False,
    spill: bool = False,
    documents: Mapping[str, str] | None = None,
    on_event: OnEvent | None = None,
) -> Execution:
    """Apply steps to a Program; nothing that is given is changed.

    Args:
        program: The original, with real weights.
        steps: What to do, in order.
        context: Data, seed and provenance; passes see a copy that holds the original.
        run_dir: Where to keep checkpoints, lock and record. An open `RunFolder` stays open.
        lock: Replay these decisions instead of deciding; any drift is an error.
        plan: Refuse unless everything is as it was planned, decisions included.
        resume: Go on with the run in `run_dir` after its last complete checkpoint.
        overwrite: Throw away the run in `run_dir`.
        spill: Let the given Program read its weights from the run folder once they are there, so
            that its memory is free for the passes' results. Its values stay the same.
        documents: Texts to keep in the run folder, by file name (`spec.resolved.yaml`).
        on_event: Told of every step's start, progress and end.

    Raises:
        FxCompressError: A check, a pass or the folder failed. The run folder keeps the last good
            state and, in `failure/`, what reproduces the error.
    """
    pipeline = Pipeline(expanded(steps))
    with ExitStack() as stack:
        folder: RunFolder | None = None
        if isinstance(run_dir, RunFolder):
            folder = run_dir
        elif run_dir is not None:
            folder = stack.enter_context(RunFolder(run_dir, resume=resume, overwrite=overwrite))
        elif resume:
            raise RunFolderError("there is nothing to resume", reason="no run folder was given")
        run = _Run(program, pipeline, context, folder, on_event, spill=spill)
        return run.go(lock, plan, documents or {})


@dataclass
class _Run:
    original: Program
    pipeline: Pipeline
    context: Context
    folder: RunFolder | None
    on_event: OnEvent | None
    spill: bool = False
    checkpoints: Checkpoints | None = field(init=False)

    def __post_init__(self) -> None:
        self.checkpoints = Checkpoints(self.folder.checkpoints) if self.folder else None
        self.context = replace(self.context, original=self.original, planning=False, read={})

    def go(self, lock: Lock | None, plan: Plan | None, documents: Mapping[str, str]) -> Execution:
        """Check, then apply every step that is not done yet."""
        if not has_values(self.original):
            raise ModelError(
                "the weights have no values",
                reason="they are on the meta device",
                hint="load weights, or use `plan`, which needs none",
            )
        check_metric(self.pipeline, self.context.metric)
        self.original.verify()
        check_finite(self.original)
        digests = Digests()
        identity = Identity.of(self.original, self.pipeline, self.context, digests)
        whole = self.pipeline
        if lock is not None:
            kept = without(whole, {entry.id for entry in lock.passes})
            self.pipeline = Pipeline(kept)
        self._check_lock(identity, lock)
        if plan is not None:
            plan.check(identity.lock(), whole)
        original_cost = cost(self.original).summary()
        record = identity.record(whole, original_cost)
        taken = {step.id for step in self.pipeline}
        left = {step.id: "it is not in the lock" for step in whole if step.id not in taken}
        record = record.model_copy(update={"stopped": left})
        probing = Probing.of(self.original, self.context)
        program, record, made = self._begin(record, identity.lock(), documents)
        self._check_resumed(made, lock)
        self._map_original()
        if record.passes:
            probing.measure(program)
            digests.take(program)
        else:
            digests.rebind(program)
        _collect()
        if self.context.metric is not None and record.original_metric is None:
            measured = self.context.evaluate(self.original)
            name = self.context.metric.name
            record = record.model_copy(update={"original_metric": measured, "metric_name": name})
        runner = StepRunner(self.context, digests, probing, record.result, lock)
        for index, step in enumerate(self.pipeline.steps[: len(record.passes)], start=1):
            self._clear_scratch(index, step)
            self._tell("resume", index, step)
        mark: tuple[int, Program] | None = None
        while True:
            stop = stop_of(self.pipeline.steps, record, self.context.metric) if not lock else None
            if stop is not None:
                program, record, made = self._undo(stop, runner, mark, record, made)
            index = len(record.passes) + 1
            if index > len(self.pipeline):
                break
            step = self.pipeline.steps[index - 1]
            if can_be_undone(step):
                mark = (index - 1, program)
            decided = {each.id: each.decision for each in record.passes}
            runner.context.rounds = earlier(step, decided)
            applied = self._apply(runner, index, step, program, record)
            if plan is not None:
                plan.check_decision(step, applied.entry, applied.decision)
            program = applied.program
            record = record.model_copy(update={"passes": (*record.passes, applied.record)})
            arrays = self._keep(index, applied, record)
            made = made.with_pass(applied.entry, arrays, self.context.read)
            self._clear_scratch(index, step)
            del applied
            self._map_original()
            _collect()
        if lock is not None:
            # A replayed decision reads no data; what it was made from stays on record.
            made = made.model_copy(update={"data": lock.data})
        record = record.model_copy(update={"state": "done"})
        self._end(record, made, program)
        path = self.folder.path if self.folder else None
        return Execution(self.original, program, record, made, path)

    def _check_lock(self, identity: Identity, lock: Lock | None) -> None:
        if lock is None:
            return
        now = identity.lock().model_copy(update={"data": data_now(lock, self.context)})
        drift = lock.drift(now, self.pipeline)
        if drift:
            raise LockError(
                "the lock does not match what is here",
                reason="; ".join(drift),
                hint="run without --locked to decide again and write a new lock",
            )

    def _check_resumed(self, made: Lock, lock: Lock | None) -> None:
        """Check that the decisions found in checkpoints are still those that would be replayed."""
        for entry, step in zip(made.passes, self.pipeline, strict=False):
            version = type(step.pass_).version
            if entry.version != version:
                raise LockError(
                    f"{step.use} has version {version}, and the checkpoint was made by version "
                    f"{entry.version}",
                    hint="start the run again with --force",
                )
            if lock is not None and entry not in lock.passes:
                raise LockError(
                    f"the checkpoint of {step.id} holds another decision than the lock",
                    hint="start the run again with --force",
                )

    def _begin(
        self, record: RunRecord, lock: Lock, documents: Mapping[str, str]
    ) -> tuple[Program, RunRecord, Lock]:
        """Claim the folder; return where to start from."""
        if self.folder is None or self.checkpoints is None:
            return self.original, record, lock
        found = self.folder.begin(record)
        for name, text in documents.items():
            write_text(self.folder.path / name, text)
        if found is not None:
            stopped = {**record.stopped, **found.stopped}
            record = record.model_copy(update={"stopped": stopped})
            self.pipeline = Pipeline(tuple(s for s in self.pipeline if s.id not in stopped))
        done = self.checkpoints.completed(record.course) if found is not None else []
        if not done:
            self.checkpoints.write(self.original)
            return self.original, record, lock
        for checkpoint in done[1:]:
            entry = checkpoint.manifest.entry
            assert entry is not None, "every checkpoint but the first is a pass's"
            self.context.read = {s: list(each) for s, each in checkpoint.manifest.read.items()}
            lock = lock.with_pass(entry, checkpoint.arrays, self.context.read)
        assert found is not None, "checkpoints are only looked for where a run was found"
        passes = tuple(each.record for each in done if each.record is not None)
        measured = {"original_metric": found.original_metric, "metric_name": found.metric_name}
        record = record.model_copy(update={"passes": passes, **measured})
        self.folder.write(record)
        program = self.checkpoints.load(done[-1], self.original, remember=True)
        return program, record, lock

    def _undo(
        self,
        stop: Stop,
        runner: StepRunner,
        mark: tuple[int, Program] | None,
        record: RunRecord,
        made: Lock,
    ) -> tuple[Program, RunRecord, Lock]:
        """Go back to where a round began, and leave out those after it."""
        if mark is not None and mark[0] == stop.keep:
            program = mark[1]
        else:
            assert self.checkpoints is not None, "a run without a folder holds its mark"
            start = self.checkpoints.completed(record.course)[stop.keep]
            program = self.checkpoints.load(start, self.original, remember=True)
        stopped = {**record.stopped, **dict.fromkeys(stop.dropped, stop.reason)}
        undone = record.passes[stop.keep :]
        kept = record.passes[: stop.keep]
        record = record.model_copy(update={"passes": kept, "stopped": stopped})
        self.pipeline = Pipeline(tuple(s for s in self.pipeline if s.id not in stopped))
        if self.folder is not None and self.checkpoints is not None:
            self.folder.write(record)
            for each in undone:
                self.checkpoints.remove(each.index, each.id)
        runner.go_back(program, record.result)
        return program, record, made.without({each.id for each in undone})

    def _apply(
        self, runner: StepRunner, index: int, step: Step, program: Program, record: RunRecord
    ) -> Applied:
        self._tell("start", index, step)
        told = self.context.on_progress

        def progress(text: str, done: int, total: int | None) -> None:
            if told is not None:
                told(text, done, total)
            self._tell("progress", index, step, text, done, total)

        runner.context.on_progress = progress
        runner.context.scratch = self.folder.scratch(index, step.id) if self.folder else None
        try:
            applied = runner.apply(index, step, program)
        except Exception as error:
            raised = _failure.explained(error, step)
            if self.folder is not None:
                failed = record.model_copy(update={"state": "failed", "error": str(raised)})
                _failure.keep(self.folder, failed, program, step, raised, self.context)
            if raised is error:
                raise
            raise raised from error
        finally:
            runner.context.on_progress = told
        self._tell("end", index, step)
        return applied

    def _keep(self, index: int, applied: Applied, record: RunRecord) -> Mapping[str, Any]:
        """Write the checkpoint; return the decision's arrays, in memory only without a folder."""
        if self.folder is None or self.checkpoints is None:
            return applied.decision.arrays
        self.checkpoints.write(
            applied.program,
            index=index,
            record=applied.record,
            entry=applied.entry,
            arrays=applied.decision.arrays,
            read=self.context.read,
        )
        self.folder.write(record)
        return self.checkpoints.arrays(index, applied.record.id)

    def _clear_scratch(self, index: int, step: Step) -> None:
        if self.folder is not None:
            self.folder.clear_scratch(index, step.id)

    def _map_original(self) -> None:
        if self.spill and self.checkpoints is not None:
            self.checkpoints.map_original(self.original)

    def _end(self, record: RunRecord, lock: Lock, program: Program) -> None:
        if self.folder is None:
            return
        lock.save(self.folder.path)
        write_text(self.folder.path / "graph.fxg", program.text())
        self.folder.write(record)

    def _tell(
        self,
        kind: Any,
        index: int,
        step: Step,
        text: str = "",
        done: int = 0,
        total: int | None = None,
    ) -> None:
        if self.on_event is not None:
            self.on_event(Event(kind, step.id, index, len(self.pipeline), text, done, total))


def _collect() -> None:
    # Graphs hold themselves in cycles: without this, the weights of every pass would stay.
    gc.collect()
