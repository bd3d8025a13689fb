"""Built-in splits: whole tensors from a file, and random inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxcompress.errors import DataError
from fxcompress.train._rows import Rows
from fxcompress.train.data import Split
from fxcompress.train.inputs import InputSpec, example

__all__ = ["from_tensors", "random_split", "read_tensors"]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read named arrays from `.npz` or `.safetensors`; nothing is unpickled.

    Raises:
        DataError: The file is missing, damaged, of another kind, or holds Python objects.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if path.suffix == ".npz":
            import numpy as np

            with np.load(path, allow_pickle=False) as archive:
                return {name: torch.from_numpy(archive[name]) for name in archive.files}
    except Exception as error:
        raise DataError(
            f"cannot read {path.name}",
            reason=f"{type(error).__name__}: {error}",
            where=str(path),
        ) from error
    raise DataError(
        f"cannot read {path.name}", reason="it should be .npz or .safetensors", where=str(path)
    )


@dataclass(frozen=True)
class _Slices(Rows):
    """Batches cut from whole tensors, as keyword arguments."""

    tensors: Mapping[str, Tensor]
    target: Tensor | None
    batch: int

    @property
    def samples(self) -> int:  # type: ignore[override]
        """How many rows the tensors have."""
        return len(next(iter(self.tensors.values())))

    def rows(self, start: int, end: int) -> Any:
        """Return these rows of all tensors."""
        batch = {name: tensor[start:end] for name, tensor in self.tensors.items()}
        return batch if self.target is None else (batch, self.target[start:end])


def from_tensors(
    name: str,
    tensors: Mapping[str, Tensor],
    *,
    inputs: Sequence[InputSpec],
    target: str | None = None,
    batch: int = 32,
    limit: int | None = None,
) -> Split:
    """Return a split of whole tensors that share dim 0: those named by inputs, and the target.

    Raises:
        DataError: A name is missing, a tensor is nobody's, or the tensors differ in length.
    """
    wanted = [spec.name for spec in inputs] or [key for key in tensors if key != target]
    needed = [*wanted, *([target] if target else [])]
    known = ", ".join(tensors) or "nothing"
    for key in needed:
        if key not in tensors:
            raise DataError(
                f"split {name} has no array {key}", reason=f"it has {known}", where=name
            )
    unread = [key for key in tensors if key not in needed]
    if unread:
        raise DataError(
            f"nothing reads the array {unread[0]} of split {name}",
            reason=f"the inputs are {', '.join(wanted)}, the target is {target or 'not named'}",
            hint=f"write `target: {unread[0]}` if it holds the labels",
            where=name,
        )
    lengths = {key: len(tensors[key]) if tensors[key].dim() else 0 for key in needed}
    if len(set(lengths.values())) > 1:
        raise DataError(
            f"the arrays of split {name} differ in length", reason=f"{lengths}", where=name
        )
    if not lengths or not next(iter(lengths.values())):
        raise DataError(f"split {name} is empty", where=name)
    labels = tensors[target] if target else None
    source = _Slices({key: tensors[key] for key in wanted}, labels, batch)
    return Split(name, source, tuple(inputs), limit)


@dataclass(frozen=True)
class _Random:
    """Random batches, the same on every pass over them."""

    inputs: tuple[InputSpec, ...]
    dims: Mapping[str, int]
    batch_dim: str | None
    samples: int
    batch: int
    seed: int

    def __len__(self) -> int:
        return -(-self.samples // self.batch)

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(self.seed)
        for start in range(0, self.samples, self.batch):
            dims = dict(self.dims)
            if self.batch_dim is not None:
                dims[self.batch_dim] = min(self.batch, self.samples - start)
            yield {spec.name: example(spec, dims, generator) for spec in self.inputs}


def random_split(
    name: str,
    samples: int,
    *,
    inputs: Sequence[InputSpec],
    dims: Mapping[str, int],
    batch: int = 32,
    seed: int = 0,
    limit: int | None = None,
) -> Split:
    """Return a split of random inputs, by name; the first dim of the first input is the batch.

    Raises:
        DataError: There are no inputs to make.
    """
    if not inputs:
        raise DataError(
            f"split {name} is random, and nothing says what the inputs are",
            hint="add `inputs:` to the spec",
            where=name,
        )
    first = inputs[0].shape[:1]
    batch_dim = first[0] if first and isinstance(first[0], str) else None
    if batch_dim is None:
        batch = int(first[0]) if first else 1
    source = _Random(tuple(inputs), dict(dims), batch_dim, samples, batch, seed)
    return Split(name, source, tuple(inputs), limit)
