"""Run a pipeline: pass by pass, proved, checkpointed, resumable."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxcompress.analysis import cost
from fxcompress.errors import RunFolderError
from fxcompress.pipeline import _failure
from fxcompress.pipeline._identity import Identity
from fxcompress.pipeline._probing import Probing
from fxcompress.pipeline._start import check_lock, check_resumed, check_runnable
from fxcompress.pipeline._state import State
from fxcompress.pipeline._step import Applied, StepRunner
from fxcompress.pipeline._store import FolderStore, FollowerStore, Store
from fxcompress.pipeline.lock import Lock
from fxcompress.pipeline.proofs import Digests
from fxcompress.pipeline.records import RunRecord
from fxcompress.pipeline.rounds import can_be_undone, earlier, expanded, stop_of, without
from fxcompress.pipeline.run_folder import RunFolder
from fxcompress.pipeline.steps import Event, OnEvent, Pipeline, Step
from fxcompress.train import World

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
        world = World.here()
        store = Store()
        if world.rank:
            path = run_dir.path if isinstance(run_dir, RunFolder) else run_dir
            store = FollowerStore(program, None if path is None else Path(path))
        elif isinstance(run_dir, RunFolder):
            store = FolderStore(run_dir, program, spill)
        elif run_dir is not None:
            folder = RunFolder(run_dir, resume=resume, overwrite=overwrite)
            store = FolderStore(stack.enter_context(folder), program, spill)
        elif resume:
            raise RunFolderError("there is nothing to resume", reason="no run folder was given")
        context = replace(context, original=program, planning=False, read={}, steps={})
        if world.rank:
            on_event = context.on_progress = None
        return _Run(program, context, store, lock, plan, on_event, world).go(
            pipeline, documents or {}
        )


@dataclass
class _Run:
    """One run.

    Attributes:
        original: The Program given.
        context: What passes are given.
        store: Where what is done is kept.
        lock: Decisions to replay, or None to decide.
        plan: What must come out as it was planned, or None.
        on_event: Told of every step.
        world: The processes that run together; the first keeps the folder.
        mark: How many passes were done where the round under way began, and the Program there.
    """

    original: Program
    context: Context
    store: Store
    lock: Lock | None
    plan: Plan | None
    on_event: OnEvent | None
    world: World
    mark: tuple[int, Program] | None = None
    runner: StepRunner = field(init=False)

    def go(self, pipeline: Pipeline, documents: Mapping[str, str]) -> Execution:
        """Check, then apply every step that is not done yet."""
        check_runnable(self.original, pipeline, self.context)
        if self.lock is None:
            pipeline.check_follows()
        digests = Digests()
        identity = Identity.of(self.original, pipeline, self.context, digests)
        start = self._start(identity, pipeline)
        probing = Probing.of(self.original, self.context)
        state = self._together(self.store.begin(start, self.context, documents))
        check_resumed(state, self.lock)
        self.runner = StepRunner(
            self.context, digests, probing, state.record.result, self.lock, self.world
        )
        self._take_up(state)
        state = self._judged(self._with_metric(state))
        while (step := state.next) is not None:
            state = self._advance(state, step)
            self._release()
            state = self._judged(state)
        return self._end(state)

    def _start(self, identity: Identity, pipeline: Pipeline) -> State:
        """Return the state before the first pass, if lock and plan are of this run."""
        kept = pipeline
        if self.lock is not None:
            kept = Pipeline(without(pipeline, {entry.id for entry in self.lock.passes}))
            check_lock(self.lock, identity, kept, self.context)
        if self.plan is not None:
            self.plan.check(identity.lock(), pipeline)
        record = identity.record(pipeline, cost(self.original).summary())
        taken = {step.id for step in kept}
        left = {step.id: "it is not in the lock" for step in pipeline if step.id not in taken}
        return State(self.original, record, identity.lock(), pipeline).left_out(left)

    def _together(self, state: State) -> State:
        """Return the state that the first process begins with."""
        record: RunRecord = self.world.told(state.record)
        if self.world.rank == 0 or record == state.record:
            return state
        same = replace(state, record=record).left_out(record.stopped)
        return replace(same, program=self.store.load(same, same.done)) if same.done else same

    def _take_up(self, state: State) -> None:
        """Get ready for the next step: what is compared with is the last good Program."""
        self.store.map_original()
        if state.done:
            self.runner.go_back(state.program, state.record.result)
        else:
            self.runner.digests.rebind(state.program)
        _collect()
        needed = state.pipeline.read_from(state.done)
        for index, step in enumerate(state.pipeline.steps[: state.done], start=1):
            if step.id in needed:
                self.context.steps[step.id] = self.store.load(state, index)
            self.store.clear_scratch(index, step)
            self._tell("resume", index, state)

    def _with_metric(self, state: State) -> State:
        """Measure the original, if nobody has."""
        metric = self.context.metric
        if metric is None or state.record.original_metric is not None:
            return state
        measured = self.runner.metric(self.original)
        return state.noted(original_metric=measured, metric_name=metric.name)

    def _advance(self, state: State, step: Step) -> State:
        """Take a step, and keep it."""
        index = state.done + 1
        if can_be_undone(step):
            self.mark = (state.done, state.program)
        decided = {each.id: each.decision for each in state.record.passes}
        self.context.rounds = earlier(step, decided)
        applied = self._apply(state, index, step)
        if self.plan is not None:
            self.plan.check_decision(step, applied.entry, applied.decision)
        done = state.after(applied)
        arrays = self.store.keep(done, applied, self.context)
        self.world.wait()
        self.store.clear_scratch(index, step)
        lock = done.lock.with_pass(applied.entry, arrays, self.context.read)
        needed = state.pipeline.read_from(index)
        reached = {**self.context.steps, step.id: done.program}
        self.context.steps = {name: each for name, each in reached.items() if name in needed}
        return replace(done, lock=lock)

    def _apply(self, state: State, index: int, step: Step) -> Applied:
        """Apply a step; on failure, leave what reproduces it."""
        self._tell("start", index, state)
        told = self.context.on_progress

        def progress(text: str, done: int, total: int | None) -> None:
            if told is not None:
                told(text, done, total)
            self._tell("progress", index, state, text, done, total)

        self.context.on_progress = progress
        self.context.scratch = self.store.scratch(index, step)
        self.context.curves = self.store.curves(index, step)
        try:
            applied = self.runner.apply(index, step, state.program)
        except Exception as error:
            raised = _failure.explained(error, step)
            self.store.fail(state, step, raised, self.context)
            if raised is error:
                raise
            raise raised from error
        finally:
            self.context.on_progress = told
        self._tell("end", index, state)
        return applied

    def _judged(self, state: State) -> State:
        """Go back to before the round that was just finished, if it went too far."""
        if self.lock is not None:
            return state
        stop = stop_of(state.pipeline.steps, state.record, self.context.metric)
        if stop is None:
            return state
        if self.mark is not None and self.mark[0] == stop.keep:
            program = self.mark[1]
        else:
            program = self.store.load(state, stop.keep)
        self.world.wait()
        back = state.undone(stop, program)
        self.store.undo(back, state.record.passes[stop.keep :])
        self.runner.go_back(program, back.record.result)
        return back

    def _release(self) -> None:
        """Give back the memory of what only the last step needed."""
        self.store.map_original()
        _collect()

    def _end(self, state: State) -> Execution:
        lock = state.lock
        if self.lock is not None:
            # A replayed decision reads no data; what it was made from stays on record.
            lock = lock.model_copy(update={"data": self.lock.data})
        state = replace(state.noted(state="done"), lock=lock)
        self.store.end(state)
        return Execution(self.original, state.program, state.record, lock, self.store.path)

    def _tell(
        self,
        kind: Any,
        index: int,
        state: State,
        text: str = "",
        done: int = 0,
        total: int | None = None,
    ) -> None:
        if self.on_event is not None:
            step = state.pipeline.steps[index - 1]
            self.on_event(Event(kind, step.id, index, len(state.pipeline), text, done, total))


def _collect() -> None:
    # Graphs hold themselves in cycles: without this, the weights of every pass would stay.
    gc.collect()
