"""Data as named splits, each a re-iterable of batches that is checked while it is read.

A batch is a tuple of positional or a mapping of keyword arguments. A labelled split yields
`(batch, target)`. Whatever a factory yields, a Split yields `(batch, target)`, with the target
None where there are no labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from fxcompress.errors import DataError
from fxcompress.train.inputs import InputSpec

__all__ = [
    "Batch",
    "Data",
    "Split",
    "from_factory",
    "one_split",
    "samples_in",
]

Batch: TypeAlias = tuple[Any, ...] | Mapping[str, Any]
"""Positional arguments as a tuple, or keyword arguments as a mapping."""


@dataclass(frozen=True)
class Split:
    """One split: a re-iterable of `(batch, target)`.

    Attributes:
        name: The split's name, for messages.
        source: Yields batches, labelled or not; iterated anew each time.
        inputs: What the model takes; batches are checked against it. May be empty: unknown.
        limit: Read no more than this many samples.
    """

    name: str
    source: Iterable[Any] = field(repr=False)
    inputs: tuple[InputSpec, ...] = ()
    limit: int | None = None

    def __iter__(self) -> Iterator[tuple[Batch, Any]]:
        """Yield `(batch, target)`.

        Raises:
            DataError: The split is empty, its source fails, or a batch does not fit the inputs.
        """
        seen, index = 0, -1
        for index, item in enumerate(self._guarded(self.source)):
            batch, target = self._normal(item, index)
            self._check(batch, index)
            count = samples_in(batch)
            if self.limit is not None and seen + count >= self.limit:
                kept = self.limit - seen
                yield _cut(batch, count, kept), _cut(target, count, kept)
                return
            seen += count
            yield batch, target
        if index < 0:
            raise self._empty()
        if self.limit is not None:
            raise DataError(
                f"split {self.name} holds {seen} samples, and {self.limit} are asked for",
                hint="ask for fewer, or give the split more samples",
                where=self.name,
            )

    def __len__(self) -> int:
        """Return the number of batches, where the source knows it and there is no limit.

        Raises:
            TypeError: It does not.
        """
        if self.limit is not None:
            raise TypeError(f"split {self.name} is cut by samples; its batches are not counted")
        if not isinstance(self.source, Sized):
            raise TypeError(f"split {self.name} does not know how many batches it has")
        return len(self.source)

    @property
    def indexed(self) -> bool:
        """Whether batches can be read in any order: the source is a sequence without a limit."""
        return self.limit is None and isinstance(self.source, Sequence)

    def at(self, places: Iterable[int]) -> Iterator[tuple[Batch, Any]]:
        """Yield `(batch, target)` at these places, in their order; needs `indexed`.

        Raises:
            DataError: As when it is iterated.
        """
        source = self.source
        assert isinstance(source, Sequence), "only a sequence can be read in any order"
        places = list(places)
        if not places:
            raise self._empty()
        for index, item in zip(places, self._guarded(source[i] for i in places), strict=True):
            batch, target = self._normal(item, index)
            self._check(batch, index)
            yield batch, target

    def __length_hint__(self) -> int:
        return len(self.source) if isinstance(self.source, Sized) else NotImplemented

    def _guarded(self, items: Iterable[Any]) -> Iterator[Any]:
        try:
            yield from items
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"reading split {self.name} failed",
                reason=f"{type(error).__name__}: {error}",
                where=self.name,
            ) from error

    def _normal(self, item: Any, index: int) -> tuple[Batch, Any]:
        """Return `(batch, target)` of one item."""
        if isinstance(item, Mapping):
            return item, None
        if isinstance(item, Tensor):
            return (item,), None
        if not isinstance(item, tuple | list) or not item:
            raise DataError(
                f"batch {index} of split {self.name} is a {type(item).__name__}",
                reason="a batch is a tuple of positional or a mapping of keyword arguments, and "
                "a labelled split gives (batch, target)",
                where=self.name,
            )
        if len(item) == 2 and isinstance(item[0], tuple | Mapping):
            return item[0], item[1]
        if self.inputs and len(item) == len(self.inputs) + 1:
            return tuple(item[:-1]), item[-1]
        return tuple(item), None

    def _check(self, batch: Batch, index: int) -> None:
        """Compare a batch with what the model takes."""
        if not self.inputs:
            return
        named = batch if isinstance(batch, Mapping) else None
        known = {spec.name: spec for spec in self.inputs}
        if named is not None:
            # A batch may hold inputs that the spec leaves out, such as a mask: forward decides.
            pairs = [(known[name], value) for name, value in named.items() if name in known]
            missing = [name for name in known if name not in named]
            if missing:
                raise self._unfit(index, f"it has no {', '.join(missing)}; it has {list(named)}")
        else:
            if len(batch) != len(self.inputs):
                names = ", ".join(known)
                raise self._unfit(index, f"it has {len(batch)} values for the inputs {names}")
            pairs = list(zip(self.inputs, batch, strict=True))
        dims: dict[str, int] = {}
        for spec, value in pairs:
            wrong = (
                spec.mismatch(value, dims)
                if isinstance(value, Tensor)
                else f"{spec.name} is a {type(value).__name__}, not a tensor"
            )
            if wrong:
                raise self._unfit(index, wrong)

    def _empty(self) -> DataError:
        return DataError(
            f"split {self.name} is empty",
            hint="a one-shot generator is exhausted after one pass: return a list or an "
            "object whose __iter__ starts anew",
            where=self.name,
        )

    def _unfit(self, index: int, reason: str) -> DataError:
        return DataError(
            f"batch {index} of split {self.name} does not fit the inputs",
            reason=reason,
            hint="a labelled split gives (batch, target), the batch a tuple or a mapping",
            where=self.name,
        )


class Data(Mapping[str, Split]):
    """Splits by name; those of a factory are made when the first is asked for."""

    def __init__(self, splits: Mapping[str, Split] | Callable[[], Mapping[str, Split]]) -> None:
        self._splits = splits

    def _made(self) -> Mapping[str, Split]:
        if callable(self._splits):
            self._splits = self._splits()
        return self._splits

    def __getitem__(self, name: str) -> Split:
        return self._made()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made())

    def __len__(self) -> int:
        return len(self._made())

    def split(self, name: str) -> Split:
        """Return a split.

        Raises:
            DataError: There is none of that name.
        """
        if name not in self:
            known = ", ".join(self) or "no splits at all"
            raise DataError(f"there is no split {name}", reason=f"the data has {known}", where=name)
        return self[name]


def from_factory(made: object, source: str, inputs: Sequence[InputSpec] = ()) -> dict[str, Split]:
    """Return the splits that a data factory returned.

    Raises:
        DataError: It is not a mapping from names to re-iterables of batches.
    """
    if not isinstance(made, Mapping):
        raise DataError(
            f"{source} returned a {type(made).__name__}",
            reason="a data factory returns a mapping from split names to iterables of batches",
            where=source,
        )
    return {str(name): one_split(str(name), part, source, inputs) for name, part in made.items()}


def one_split(
    name: str, part: object, source: str, inputs: Sequence[InputSpec] = (), limit: int | None = None
) -> Split:
    """Return the split of an iterable of batches.

    Raises:
        DataError: It cannot be iterated, or only once.
    """
    if isinstance(part, Iterator) or not isinstance(part, Iterable) or isinstance(part, str):
        once = isinstance(part, Iterator)
        raise DataError(
            f"split {name} of {source} {'can be read only once' if once else 'is no iterable'}",
            reason=f"it is a {type(part).__name__}",
            hint="return a list, a DataLoader, or an object whose __iter__ starts anew",
            where=source,
        )
    return Split(name, part, tuple(inputs), limit)


def samples_in(batch: Batch) -> int:
    """Return the size of dim 0 of the first tensor of a batch."""
    for value in batch.values() if isinstance(batch, Mapping) else batch:
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0]
    return 1


def _cut(value: Any, size: int, count: int) -> Any:
    """Return the first `count` of the `size` samples in a batch or a target."""
    from torch.utils import _pytree as pytree

    def cut(leaf: Any) -> Any:
        whole = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == size
        return leaf[:count] if whole else leaf

    return pytree.tree_map(cut, value) if count < size else value
