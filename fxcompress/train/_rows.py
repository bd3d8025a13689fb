"""Batches cut from rows that can be read by number: what built-in splits are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

__all__ = ["Rows"]


class Rows(Sequence[Any], ABC):
    """Batches of rows in their order; the last may have fewer.

    Attributes:
        samples: How many rows there are.
        batch: Rows in a batch.
    """

    samples: int
    batch: int

    def __len__(self) -> int:
        return -(-self.samples // self.batch)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.rows(index * self.batch, min((index + 1) * self.batch, self.samples))

    @abstractmethod
    def rows(self, start: int, end: int) -> Any:
        """Return one batch, labelled or not."""
