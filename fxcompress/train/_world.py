"""The processes that train together: each has the whole model and a part of every batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils import _pytree as pytree

from fxcompress.errors import WorkerError
from fxcompress.train._sharding import is_spread
from fxcompress.train.data import samples_in

__all__ = ["World"]

_BUCKET = 25_000_000
"""Numbers that are added up at once."""


@dataclass(frozen=True)
class World:
    """The processes of a training, and which of them this is.

    Attributes:
        rank: This process, from 0.
        size: How many there are.
        device: Where what they exchange must be.
        sharded: Whether each has a part of the weights, and FSDP exchanges gradients.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    sharded: bool = False

    @classmethod
    def here(cls, device: torch.device | None = None, *, sharded: bool = False) -> World:
        """Return the processes that torch.distributed joined; this one alone if it joined none.

        Args:
            device: Where what they exchange must be; the CPU where that is all there is.
            sharded: Whether FSDP exchanges the gradients.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(
            distributed.get_rank(), distributed.get_world_size(), str(device or "cpu"), sharded
        )

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.size == 1

    def part_of(self, batch: Any, target: Any) -> tuple[Any, Any, bool]:
        """Return this process's rows of a batch, and whether they count.

        Rows are dealt out in blocks. A process that would get none gets the first row, not to be
        counted, so that it takes part in what all do together.
        """
        count = samples_in(batch)
        start, end = self.rank * count // self.size, (self.rank + 1) * count // self.size
        counts = end > start
        rows = slice(start, end) if counts else slice(0, 1)

        def cut(leaf: Any) -> Any:
            whole = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == count
            return leaf[rows] if whole else leaf

        return pytree.tree_map(cut, batch), pytree.tree_map(cut, target), counts

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the sums over all processes, which must give the same names."""
        if self.alone:
            return dict(values)
        names = sorted(values)
        tensor = torch.tensor([values[name] for name in names], dtype=torch.float64)
        return dict(zip(names, self._reduced(tensor).tolist(), strict=True))

    def agree(self, flag: bool) -> bool:
        """Return whether all processes say yes."""
        return self.sum({"no": 0.0 if flag else 1.0})["no"] == 0

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give every process the sum of all gradients; one that has none adds zeros."""
        if self.alone:
            return
        if self.sharded:
            # FSDP has given each process its part of the mean.
            if means := [p.grad for p in parameters if is_spread(p) and p.grad is not None]:
                torch._foreach_mul_(means, self.size)
        others = [p for p in parameters if not is_spread(p)]
        if not others:
            return
        has = torch.tensor([0.0 if p.grad is None else 1.0 for p in others])
        wanted = self._reduced(has).tolist()
        chosen = [p for p, count in zip(others, wanted, strict=True) if count]
        for parameter in chosen:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([p.grad for p in chosen if p.grad is not None]):
            flat = self._reduced(torch.cat([each.reshape(-1) for each in bucket]))
            parts = torch.split(flat, [each.numel() for each in bucket])
            torch._foreach_copy_(bucket, [p.view_as(g) for p, g in zip(parts, bucket, strict=True)])

    def same(self, tensors: Sequence[Tensor]) -> None:
        """Give every process the tensors of the first, in place."""
        if self.alone:
            return
        with self._guarded():
            for tensor in tensors:
                distributed.broadcast(tensor.detach(), 0)

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        """Give every process the mean of all, in place."""
        if self.alone:
            return
        for bucket in _buckets(tensors):
            flat = self._reduced(torch.cat([each.reshape(-1) for each in bucket])) / self.size
            parts = torch.split(flat, [each.numel() for each in bucket])
            torch._foreach_copy_(bucket, [p.view_as(t) for p, t in zip(parts, bucket, strict=True)])

    def gathered(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank: plain data and tensors."""
        if self.alone:
            return [value]
        held: list[Any] = [None] * self.size
        with self._guarded():
            distributed.all_gather_object(held, value)
        return held

    def wait(self) -> None:
        """Wait until all processes are here."""
        if not self.alone:
            with self._guarded():
                distributed.barrier()

    def check_same(self, told: Mapping[str, str]) -> None:
        """Check that all processes were told the same.

        Raises:
            WorkerError: They were not; every process says so.
        """
        everyone = self.gathered(dict(told))
        differs = [
            f"{name}: {', '.join(dict.fromkeys(each.get(name, 'nothing') for each in everyone))}"
            for name in sorted(set().union(*everyone))
            if len({each.get(name) for each in everyone}) > 1
        ]
        if differs:
            raise WorkerError(
                "the processes were told different things",
                reason="; ".join(differs),
                hint="start all with the same spec and options",
            )

    def told(self, value: Any) -> Any:
        """Return the value that the first process has: plain data."""
        if self.alone:
            return value
        held = [value]
        with self._guarded():
            distributed.broadcast_object_list(held, 0)
        return held[0]

    def _reduced(self, tensor: Tensor) -> Tensor:
        moved = tensor.to(self.device)
        with self._guarded():
            distributed.all_reduce(moved)
        return moved

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise WorkerError(
                f"process {self.rank} of {self.size} lost the others",
                reason=str(error).splitlines()[0],
                hint="one of them died or hangs: its own message says why; start all again",
            ) from error


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors of one dtype together, up to a size."""
    held: list[Tensor] = []
    for tensor in tensors:
        full = sum(each.numel() for each in held) + tensor.numel() > _BUCKET
        if held and (full or tensor.dtype != held[0].dtype):
            yield held
            held = []
        held.append(tensor)
    if held:
        yield held
