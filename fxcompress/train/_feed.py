"""The order in which a training reads its data: the same for the same seed, epoch by epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxcompress.errors import DataError
from fxcompress.train.data import Split, samples_in

__all__ = ["Feed", "seed_of"]

WINDOW = 64
"""Batches held at once, where a source cannot be read in any order or samples are mixed."""

Labelled = tuple[Any, Any]


def seed_of(seed: int, what: str, epoch: int = 0) -> int:
    """Return a seed for one use in one epoch, unrelated to those of others."""
    digest = hashlib.sha256(f"{seed} {what} {epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Feed:
    """Batches of a split, in another order each epoch.

    Sources that draw random numbers (augmentation, a shuffling loader) find torch's default
    generator at a state of their own, so that what the model draws (dropout) moves neither.

    Args:
        split: `(batch, target)` pairs, re-iterable.
        shuffle: `batches`, `samples` or `none`.
        seed: Decides on every order.
        change: What happens to each batch, such as augmentation.
    """

    def __init__(
        self,
        split: Split,
        shuffle: str,
        seed: int,
        change: Callable[[Any, Any], Labelled] | None = None,
    ) -> None:
        self.split, self.shuffle, self.seed, self.change = split, shuffle, seed, change
        self._state = torch.get_rng_state()

    def count(self) -> int:
        """Return how many batches an epoch has; a split that does not know is read once."""
        try:
            return len(self.split)
        except TypeError:
            return sum(1 for _ in self._drawn(iter(self.split), 0))

    def epoch(self, number: int, skip: int = 0) -> Iterator[Labelled]:
        """Yield the batches of an epoch but the first `skip`, which are read and dropped.

        Raises:
            DataError: The split fails, or holds fewer than `skip` batches.
        """
        order = torch.Generator().manual_seed(seed_of(self.seed, "order", number))
        batches = self._drawn(self._ordered(order), number, self.change)
        for index in range(skip):
            if next(batches, None) is None:
                raise DataError(
                    f"split {self.split.name} is shorter than when the training began",
                    reason=f"it has {index} batches, and {skip} of this epoch were trained on",
                    where=self.split.name,
                )
        yield from batches

    def _ordered(self, order: torch.Generator) -> Iterator[Labelled]:
        if self.shuffle == "none":
            return iter(self.split)
        if self.split.indexed:
            places = torch.randperm(len(self.split), generator=order).tolist()
            batches = self.split.at(places)
        else:
            batches = _stirred(iter(self.split), order)
        return batches if self.shuffle == "batches" else _mixed(batches, order, self.split.name)

    def _drawn(
        self,
        batches: Iterator[Labelled],
        number: int,
        change: Callable[[Any, Any], Labelled] | None = None,
    ) -> Iterator[Labelled]:
        """Yield batches, each made with the data's own state of torch's generator."""
        torch_state = torch.Generator().manual_seed(seed_of(self.seed, "data", number))
        self._state = torch_state.get_state()
        while True:
            with self._reading():
                item = next(batches, None)
                if item is not None and change is not None:
                    item = change(*item)
            if item is None:
                return
            yield item

    @contextmanager
    def _reading(self) -> Iterator[None]:
        model = torch.get_rng_state()
        torch.set_rng_state(self._state)
        try:
            yield
        finally:
            self._state = torch.get_rng_state()
            torch.set_rng_state(model)


def _stirred(batches: Iterator[Labelled], order: torch.Generator) -> Iterator[Labelled]:
    """Yield batches in random order as far as a window of them allows."""
    held: list[Labelled] = []
    for item in batches:
        if len(held) < WINDOW:
            held.append(item)
            continue
        place = int(torch.randint(WINDOW, (), generator=order))
        held[place], item = item, held[place]
        yield item
    for place in torch.randperm(len(held), generator=order).tolist():
        yield held[place]


def _mixed(batches: Iterable[Labelled], order: torch.Generator, name: str) -> Iterator[Labelled]:
    """Yield batches of the sizes that were read, with the samples of a window mixed."""
    window: list[Labelled] = []
    for item in batches:
        window.append(item)
        if len(window) == WINDOW:
            yield from _cut_anew(window, order, name)
            window = []
    if window:
        yield from _cut_anew(window, order, name)


def _cut_anew(window: Sequence[Labelled], order: torch.Generator, name: str) -> Iterator[Labelled]:
    sizes = [samples_in(batch) for batch, _ in window]
    flat = [pytree.tree_flatten(item) for item in window]
    tree = flat[0][1]
    if any(each != tree for _, each in flat):
        raise _unlike(name, "their structure differs")
    shuffled = torch.randperm(sum(sizes), generator=order)
    columns = [
        _column([leaves[place] for leaves, _ in flat], sizes, shuffled, name)
        for place in range(tree.num_leaves)
    ]
    for leaves in zip(*columns, strict=True):
        batch, target = pytree.tree_unflatten(list(leaves), tree)
        yield batch, target


def _column(
    leaves: Sequence[Any], sizes: Sequence[int], shuffled: Tensor, name: str
) -> Sequence[Any]:
    """Return one leaf of each new batch."""
    if not isinstance(leaves[0], Tensor):
        if any(leaf != leaves[0] for leaf in leaves):
            raise _unlike(name, f"a value that is no tensor differs: {leaves[0]!r}")
        return leaves
    for leaf, size in zip(leaves, sizes, strict=True):
        if leaf.shape[:1] != (size,) or leaf.shape[1:] != leaves[0].shape[1:]:
            raise _unlike(name, f"tensors of {tuple(leaves[0].shape)} and {tuple(leaf.shape)}")
    whole = torch.cat(list(leaves))
    return torch.split(whole[shuffled.to(whole.device)], list(sizes))


def _unlike(name: str, reason: str) -> DataError:
    return DataError(
        f"the samples of split {name} cannot be shuffled",
        reason=f"batches are not alike: {reason}",
        hint="write `shuffle: batches`",
        where=name,
    )
