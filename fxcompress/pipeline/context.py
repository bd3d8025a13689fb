"""What a pass may know beside the Program: data, seed, the original, and whether it is a plan."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from fxcompress.errors import DataError

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.train.data import Split
    from fxcompress.train.metrics import Metric

__all__ = ["Batch", "Context"]

Batch: TypeAlias = tuple[Any, ...] | Mapping[str, Any]
"""Positional arguments as a tuple, or keyword arguments as a mapping."""


@dataclass
class Context:
    """What passes are given beside the Program and their options.

    Attributes:
        data: Split name -> re-iterable of batches.
        seed: Every pass starts with torch's generators at this seed.
        planning: Decide what can be decided without running the model; name the rest as pending.
        original: The Program before the first pass; the teacher of a distillation.
        teacher: Another teacher, given to `compress`.
        steps: By id, the results of earlier steps that this or a later one reads.
        name: The run's name.
        spec: Digest of the spec and all it extends and names; empty when composed in code.
        folder: Where the files lie that options name: the spec's folder, or the working folder.
        metric: What results are judged by, on one split of `data`; measured after every pass.
        reproduce: Further entries (`data`, `metric`) of the spec that reproduces a failure.
        on_progress: Called with `(text, done, total)`.
        read: Per split, the digest of each batch that was read through `batches`, in order.
        scratch: A folder of the pass's own, kept over a kill and removed once its checkpoint is
            there; None where the run keeps nothing.
        curves: Where a pass may write TensorBoard's files; None where the run keeps nothing.
        rounds: What the same step decided in earlier rounds, where it is part of rounds.
        measured: Figures that differ from run to run, such as throughput: for the pass's record,
            never for its decision.
    """

    data: Mapping[str, Iterable[Any]] = field(default_factory=dict)
    seed: int = 0
    planning: bool = False
    original: Program | None = None
    teacher: Program | None = None
    steps: dict[str, Program] = field(default_factory=dict)
    name: str = "run"
    spec: str = ""
    folder: Path = Path()
    metric: Metric | None = None
    reproduce: Mapping[str, Any] = field(default_factory=dict)
    on_progress: Callable[[str, int, int | None], None] | None = None
    read: dict[str, list[str]] = field(default_factory=dict)
    scratch: Path | None = None
    curves: Path | None = None
    rounds: tuple[Mapping[str, Any], ...] = ()
    measured: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def progress(self, text: str, done: int, total: int | None = None) -> None:
        """Tell how far a long computation is."""
        if self.on_progress is not None:
            self.on_progress(text, done, total)

    def has(self, split: str) -> bool:
        """Whether there is data of that name."""
        return split in self.data

    def batches(self, split: str, count: int | None = None) -> Iterator[Batch]:
        """Yield batches without labels, `count` of them (all, if None), hashed for the lock.

        Raises:
            DataError: The split is missing, empty, or holds fewer than `count` batches, or gives
                other batches than when it was read before.
        """
        given = 0
        # What is read is recorded, so nothing beyond the last batch may be.
        for batch, _ in () if count == 0 else self._recorded(split):
            given += 1
            self.progress(f"reading {split}", given, count)
            yield batch
            if given == count:
                return
        if count is not None and given < count:
            raise DataError(
                f"split {split} holds {given} batches, and {count} are asked for",
                hint="ask for fewer, or give the split more batches",
                where=split,
            )

    def samples(self, split: str, count: int) -> Iterator[Batch]:
        """Yield batches that hold `count` samples (entries of dim 0) together; the last is cut.

        Raises:
            DataError: As for `batches`, or there are fewer than `count` samples.
        """
        return (batch for batch, _ in self.labelled_samples(split, count))

    def labelled_samples(self, split: str, count: int) -> Iterator[tuple[Batch, Any]]:
        """Yield `(batch, target)` as `samples` does; the target is None where there are no labels.

        Raises:
            DataError: As for `samples`.
        """
        from fxcompress.train.data import Split, samples_in

        seen = 0
        for batch, target in Split(split, self._recorded(split), limit=count):
            seen += samples_in(batch)
            self.progress(f"reading {split}", seen, count)
            yield batch, target

    def labelled(self, split: str) -> Iterator[tuple[Batch, Any]]:
        """Yield `(batch, target)`; the target is None where the split has no labels."""
        return iter(self.split(split))

    def evaluate(self, program: Program) -> float | None:
        """Return the metric of a Program, or None where there is no metric.

        Raises:
            DataError: The metric's split is missing, empty or has no labels.
            NumericsError: The metric is NaN.
        """
        if self.metric is None:
            return None
        original = None if self.original is None else self.original.module
        split = {name: self.split(name) for name in self.data if name == self.metric.split}
        return self.metric.evaluate(program.module, split, original)

    def split(self, name: str) -> Split:
        """Return a split, checked while it is read.

        Raises:
            DataError: There is none of that name, or it can be read only once.
        """
        from fxcompress.train.data import Split, one_split

        if name not in self.data:
            names = ", ".join(sorted(self.data)) or "no data at all"
            raise DataError(
                f"there is no split {name}",
                reason=f"the data has {names}",
                hint=f"let the data factory return a split called {name!r}",
                where=name,
            )
        found = self.data[name]
        return found if isinstance(found, Split) else one_split(name, found, "the data")

    def _recorded(self, name: str) -> Iterator[tuple[Batch, Any]]:
        """Yield `(batch, target)` and note the digest of each batch.

        Raises:
            DataError: A batch is not what it was when it was read before.
        """
        known = self.read.setdefault(name, [])
        for index, (batch, target) in enumerate(self.split(name)):
            digest = digest_of(batch)
            if index == len(known):
                known.append(digest)
            elif known[index] != digest:
                raise DataError(
                    f"split {name} gives another batch {index} than before",
                    reason="a run must be repeatable, and its lock names the data it saw",
                    hint="let the data factory return the same batches in the same order",
                    where=name,
                )
            yield batch, target


def digest_of(batch: Batch) -> str:
    """Return the SHA-256 of a batch: names, dtypes, shapes and bytes of its leaves."""
    import torch
    from torch.utils import _pytree as pytree

    from fxcompress.ir import hash_tensor

    sha = hashlib.sha256()
    for path, leaf in pytree.tree_flatten_with_path(batch)[0]:
        sha.update(pytree.keystr(path).encode())
        if isinstance(leaf, torch.Tensor):
            sha.update(hash_tensor(leaf).encode())
        else:
            sha.update(repr(leaf).encode())
    return sha.hexdigest()
