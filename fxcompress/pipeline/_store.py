"""Where a run keeps what it needs to go on: in a folder, or nowhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxcompress._files import write_text
from fxcompress.pipeline import _failure
from fxcompress.pipeline._state import State
from fxcompress.pipeline.checkpoints import Checkpoints

if TYPE_CHECKING:
    from fxcompress.errors import FxCompressError
    from fxcompress.ir import Program
    from fxcompress.pipeline._step import Applied
    from fxcompress.pipeline.context import Context
    from fxcompress.pipeline.records import PassRecord, RunRecord
    from fxcompress.pipeline.run_folder import RunFolder
    from fxcompress.pipeline.steps import Step

__all__ = ["FolderStore", "FollowerStore", "Store"]


class Store:
    """Keeps nothing: what a run has is in memory, and a killed run is lost."""

    path: Path | None = None

    def begin(self, start: State, context: Context, documents: Mapping[str, str]) -> State:
        """Claim the place; return where the run starts from, later than `start` if resumed.

        Args:
            start: The state before the first pass.
            context: Its `read` becomes what the passes that are done have read.
            documents: Texts to keep, by file name.
        """
        return start

    def scratch(self, index: int, step: Step) -> Path | None:
        """Return where a pass may keep what it needs to go on after a kill."""
        return None

    def curves(self, index: int, step: Step) -> Path | None:
        """Return where a pass may write TensorBoard's files."""
        return None

    def clear_scratch(self, index: int, step: Step) -> None:
        """Remove what a pass that is done kept to go on."""

    def keep(self, done: State, applied: Applied, context: Context) -> Mapping[str, Any]:
        """Keep a pass; return its decision's arrays, in memory only where that is all there is."""
        return applied.decision.arrays

    def load(self, state: State, passes: int) -> Program:
        """Return the Program after the first `passes` of those that are done."""
        raise AssertionError("a run without a folder holds what it may go back to")

    def undo(self, back: State, undone: Iterable[PassRecord]) -> None:
        """Forget passes that were undone; the run goes on from `back`."""

    def map_original(self) -> None:
        """Let the original read its weights from here, where that was asked for."""

    def fail(self, state: State, step: Step, error: FxCompressError, context: Context) -> None:
        """Keep what reproduces the failure of a step."""

    def end(self, state: State) -> None:
        """Keep the result of the run."""


@dataclass
class FollowerStore(Store):
    """Reads what the first process of several keeps in the run folder, and writes nothing.

    Attributes:
        original: The Program given.
        path: The folder; nothing is read from it unless the run is resumed.
    """

    original: Program
    path: Path | None = None

    def load(self, state: State, passes: int) -> Program:
        """Load the Program of a checkpoint.

        Raises:
            RunFolderError: It cannot be read: all processes must see the folder.
        """
        checkpoints = Checkpoints((self.path or Path()) / "checkpoints")
        kept = checkpoints.completed(state.record.course)[passes]
        return checkpoints.load(kept, self.original, remember=True)


@dataclass
class FolderStore(Store):
    """Keeps checkpoints, lock and record in a run folder.

    Attributes:
        folder: An open folder.
        original: The Program given.
        spill: Whether the original shall read its weights from here once they are kept.
    """

    folder: RunFolder
    original: Program
    spill: bool = False
    checkpoints: Checkpoints = field(init=False)

    def __post_init__(self) -> None:
        self.path = self.folder.path
        self.checkpoints = Checkpoints(self.folder.checkpoints)

    def begin(self, start: State, context: Context, documents: Mapping[str, str]) -> State:
        """Claim the folder; go on after the last complete checkpoint of the run in it.

        Raises:
            RunFolderError: The folder holds another run, or what it holds is damaged.
        """
        found = self.folder.begin(start.record)
        for name, text in documents.items():
            write_text(self.folder.path / name, text)
        if found is None:
            self.checkpoints.write(self.original)
            return start
        return self._resumed(start.left_out(found.stopped), found, context)

    def _resumed(self, start: State, found: RunRecord, context: Context) -> State:
        done = self.checkpoints.completed(start.record.course)
        if not done:
            self.checkpoints.write(self.original)
            return start
        lock = start.lock
        for checkpoint in done[1:]:
            entry = checkpoint.manifest.entry
            assert entry is not None, "every checkpoint but the first is a pass's"
            context.read = {s: list(each) for s, each in checkpoint.manifest.read.items()}
            lock = lock.with_pass(entry, checkpoint.arrays, context.read)
        state = start.noted(
            passes=tuple(each.record for each in done if each.record is not None),
            original_metric=found.original_metric,
            metric_name=found.metric_name,
        )
        self.folder.write(state.record)
        program = self.checkpoints.load(done[-1], self.original, remember=True)
        return replace(state, program=program, lock=lock)

    def scratch(self, index: int, step: Step) -> Path | None:
        """Return a folder of the pass's own, which it has to make."""
        return self.folder.scratch(index, step.id)

    def curves(self, index: int, step: Step) -> Path | None:
        """Return a folder of the pass's own, which it has to make."""
        return self.folder.curves(index, step.id)

    def clear_scratch(self, index: int, step: Step) -> None:
        """Remove the pass's folder."""
        self.folder.clear_scratch(index, step.id)

    def keep(self, done: State, applied: Applied, context: Context) -> Mapping[str, Any]:
        """Write the checkpoint; return the decision's arrays as they are on disk."""
        index = applied.record.index
        self.checkpoints.write(
            applied.program,
            index=index,
            record=applied.record,
            entry=applied.entry,
            arrays=applied.decision.arrays,
            read=context.read,
        )
        self.folder.write(done.record)
        return self.checkpoints.arrays(index, applied.record.id)

    def load(self, state: State, passes: int) -> Program:
        """Load the Program of a checkpoint."""
        kept = self.checkpoints.completed(state.record.course)[passes]
        return self.checkpoints.load(kept, self.original, remember=True)

    def undo(self, back: State, undone: Iterable[PassRecord]) -> None:
        """Remove checkpoints, after the record says that they do not count."""
        self.folder.write(back.record)
        for each in undone:
            self.checkpoints.remove(each.index, each.id)

    def map_original(self) -> None:
        """Map the original's weights from the first checkpoint, if it may spill."""
        if self.spill:
            self.checkpoints.map_original(self.original)

    def fail(self, state: State, step: Step, error: FxCompressError, context: Context) -> None:
        """Write `failure/` and the failed record."""
        failed = state.noted(state="failed", error=str(error))
        _failure.keep(self.folder, failed.record, state.program, step, error, context)

    def end(self, state: State) -> None:
        """Write the lock, the graph and the record."""
        state.lock.save(self.folder.path)
        write_text(self.folder.path / "graph.fxg", state.program.text())
        self.folder.write(state.record)
