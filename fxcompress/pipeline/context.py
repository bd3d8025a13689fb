"""What a pass may know beside the Program: data, seed, the original, and whether it is a plan."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fxcompress.errors import DataError

if TYPE_CHECKING:
    from fxcompress.ir import Program

__all__ = ["Batch", "Context", "call", "unlabelled"]

Batch = tuple[Any, ...] | Mapping[str, Any]
"""Positional arguments as a tuple, or keyword arguments as a mapping."""


def unlabelled(item: Any) -> tuple[Batch, Any]:
    """Return `(batch, target)` of what a split yields; the target is None without labels.

    A labelled item is `(batch, target)` with the batch a tuple or a mapping. A bare tensor is a
    batch of one argument.
    """
    if isinstance(item, Mapping):
        return item, None
    if isinstance(item, (tuple, list)):
        if len(item) == 2 and isinstance(item[0], (tuple, Mapping)):
            return item[0], item[1]
        return tuple(item), None
    return (item,), None


def call(program: Callable[..., Any], batch: Batch) -> Any:
    """Call a Program or module with a batch."""
    return program(**batch) if isinstance(batch, Mapping) else program(*batch)


@dataclass
class Context:
    """What passes are given beside the Program and their options.

    Attributes:
        data: Split name -> re-iterable of batches.
        seed: Every pass starts with torch's generators at this seed.
        planning: Decide what can be decided without running the model; name the rest as pending.
        original: The Program before the first pass; the teacher of a distillation.
        name: The run's name.
        spec: Digest of the spec and all it extends and names; empty when composed in code.
        metric: `(callable model) -> float` on the spec's metric and split, if there is one.
        reproduce: Further entries (`data`, `metric`) of the spec that reproduces a failure.
        on_progress: Called with `(text, done, total)`.
        read: Per split, the digest of each batch that was read through `batches`, in order.
    """

    data: Mapping[str, Iterable[Any]] = field(default_factory=dict)
    seed: int = 0
    planning: bool = False
    original: Program | None = None
    name: str = "run"
    spec: str = ""
    metric: Callable[[Callable[..., Any]], float] | None = None
    reproduce: Mapping[str, Any] = field(default_factory=dict)
    on_progress: Callable[[str, int, int | None], None] | None = None
    read: dict[str, list[str]] = field(default_factory=dict)

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
        for index, (batch, _) in enumerate(self._items(split, count)):
            self._record(split, index, batch)
            self.progress(f"reading {split}", index + 1, count)
            yield batch

    def samples(self, split: str, count: int) -> Iterator[Batch]:
        """Yield batches that hold `count` samples (entries of dim 0) together; the last is cut.

        Raises:
            DataError: As for `batches`, or there are fewer than `count` samples.
        """
        seen = 0
        for index, (batch, _) in enumerate(self._items(split, None)):
            self._record(split, index, batch)
            size = batch_size(batch)
            yield _first(batch, size, count - seen) if seen + size > count else batch
            seen += size
            self.progress(f"reading {split}", min(seen, count), count)
            if seen >= count:
                return
        raise DataError(
            f"split {split} holds {seen} samples, and {count} are asked for",
            hint="ask for fewer, or let the data factory yield more",
            where=split,
        )

    def labelled(self, split: str) -> Iterator[tuple[Batch, Any]]:
        """Yield `(batch, target)`; the target is None where the split has no labels."""
        return self._items(split, None)

    def _items(self, split: str, count: int | None) -> Iterator[tuple[Batch, Any]]:
        if split not in self.data:
            names = ", ".join(sorted(self.data)) or "no data at all"
            raise DataError(
                f"there is no split {split}",
                reason=f"the data has {names}",
                hint=f"let the data factory return a split called {split!r}",
                where=split,
            )
        given = 0
        for item in self.data[split]:
            if count is not None and given >= count:
                return
            yield unlabelled(item)
            given += 1
        if given == 0:
            raise DataError(f"split {split} is empty", where=split)
        if count is not None and given < count:
            raise DataError(
                f"split {split} holds {given} batches, and {count} are asked for",
                hint="ask for fewer, or let the data factory yield more",
                where=split,
            )

    def _record(self, split: str, index: int, batch: Batch) -> None:
        digest = digest_of(batch)
        known = self.read.setdefault(split, [])
        if index == len(known):
            known.append(digest)
        elif index < len(known) and known[index] != digest:
            raise DataError(
                f"split {split} gives another batch {index} than before",
                reason="a run must be repeatable, and its lock names the data it saw",
                hint="let the data factory return the same batches in the same order every time",
                where=split,
            )


def batch_size(batch: Batch) -> int:
    """Return the size of dim 0 of the first tensor in a batch."""
    import torch
    from torch.utils import _pytree as pytree

    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            return leaf.shape[0]
    raise DataError("a batch holds no tensor", reason=f"it is {type(batch).__name__}")


def _first(batch: Batch, size: int, count: int) -> Batch:
    """Return the first `count` of the `size` samples in a batch."""
    import torch
    from torch.utils import _pytree as pytree

    def cut(leaf: Any) -> Any:
        batched = isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == size
        return leaf[:count] if batched else leaf

    cut_batch: Batch = pytree.tree_map(cut, batch)
    return cut_batch


def digest_of(batch: Batch) -> str:
    """Return the SHA-256 of a batch: names, dtypes, shapes and bytes of its leaves."""
    import torch
    from torch.utils import _pytree as pytree

    sha = hashlib.sha256()
    for path, leaf in pytree.tree_flatten_with_path(batch)[0]:
        sha.update(pytree.keystr(path).encode())
        if isinstance(leaf, torch.Tensor):
            flat = leaf.detach().cpu().contiguous()
            sha.update(f"{flat.dtype}{tuple(flat.shape)}".encode())
            sha.update(flat.reshape(-1).view(torch.uint8).numpy())
        else:
            sha.update(repr(leaf).encode())
    return sha.hexdigest()
