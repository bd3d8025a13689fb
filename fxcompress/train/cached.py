"""Outputs of a teacher kept on disk, found again sample by sample.

    outputs.json                  what is kept, and in which shard
    shard-00000.safetensors       keys [n, 16] and logits [n, …], or the k largest and their places

A sample is known by a hash of its tensors, so that shuffled batches find their rows. Of a sample's
logits all are kept, or the k largest: the others are given back as −inf, of which losses know that
nothing is known.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fxcompress._files import replaced_folder, write_text
from fxcompress.errors import DataError, RunFolderError, UsageError
from fxcompress.train.data import samples_in
from fxcompress.train.metrics import call, evaluating, main_output

__all__ = ["CachedOutputs", "cache_outputs", "check_cached"]

DOCUMENT = "outputs.json"
FORMAT = 1
_KEY = 16


def cache_outputs(
    model: nn.Module,
    data: Iterable[Any],
    folder: str | Path,
    *,
    top_k: int | None = None,
    shard: int = 4096,
) -> Path:
    """Run a model over data and keep its logits; the folder appears as a whole or not at all.

    Args:
        model: A module or a Program's; run in eval mode without gradients.
        data: `(batch, target)` pairs, such as a Split, or batches.
        folder: Where to; replaced if it is there.
        top_k: Keep only so many logits of each place; all by default.
        shard: Samples per file.

    Raises:
        DataError: There are no data, or the outputs differ in shape.
        RunFolderError: The folder cannot be written.
    """
    folder = Path(folder)
    count = shards = 0
    shape: tuple[int, ...] | None = None
    module = getattr(model, "module", model)
    with replaced_folder(folder) as stage, torch.no_grad(), evaluating(module):
        held: list[tuple[Tensor, Tensor]] = []
        for batch in _batches(data):
            logits = main_output(call(model, batch)).detach().cpu()
            if shape not in (None, tuple(logits.shape[1:])):
                raise DataError(
                    "the outputs of the teacher differ in shape",
                    reason=f"{list(shape or ())} and {list(logits.shape[1:])} per sample",
                    hint="pad all batches to one length",
                )
            shape = tuple(logits.shape[1:])
            held.append((_keys(batch), logits))
            count += len(logits)
            if sum(len(keys) for keys, _ in held) >= shard:
                _write(stage, shards, held, top_k)
                held, shards = [], shards + 1
        if held:
            _write(stage, shards, held, top_k)
            shards += 1
        if shape is None:
            raise DataError("there is nothing to run the teacher on", reason="the data are empty")
        document = {
            "format": FORMAT, "samples": count, "shards": shards, "shape": list(shape),
            "top_k": top_k,
        }  # fmt: skip
        write_text(stage / DOCUMENT, json.dumps(document, indent=1) + "\n")
    return folder


def _batches(data: Iterable[Any]) -> Iterator[Any]:
    for item in data:
        labelled = isinstance(item, tuple | list) and len(item) == 2
        batch = item[0] if labelled and isinstance(item[0], tuple | Mapping) else item
        yield (batch,) if isinstance(batch, Tensor) else batch


def _keys(batch: Any) -> Tensor:
    """Return a hash of each sample of a batch, `[batch, 16]` bytes."""
    values = [batch[name] for name in sorted(batch)] if isinstance(batch, Mapping) else list(batch)
    rows = samples_in(batch)
    leaves = [
        value.detach().cpu().contiguous()
        for value in values
        if isinstance(value, Tensor) and value.dim() and len(value) == rows
    ]
    found = []
    for row in range(rows):
        sha = hashlib.blake2b(digest_size=_KEY)
        for leaf in leaves:
            sha.update(f"{leaf.dtype} {tuple(leaf.shape[1:])} ".encode())
            sha.update(leaf[row].reshape(-1).view(torch.uint8).numpy().tobytes())
        found.append(list(sha.digest()))
    return torch.tensor(found, dtype=torch.uint8)


def _write(folder: Path, number: int, held: list[tuple[Tensor, Tensor]], top_k: int | None) -> None:
    keys, logits = (torch.cat(parts) for parts in zip(*held, strict=True))
    tensors = {"keys": keys}
    if top_k is None or top_k >= logits.shape[-1]:
        tensors["logits"] = logits
    else:
        values, places = logits.float().topk(top_k, dim=-1)
        tensors["values"], tensors["places"] = values, places.to(torch.int32)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / f"shard-{number:05d}.safetensors")


class CachedOutputs(nn.Module):
    """A teacher that was run before: called with a batch, it returns the logits of its samples.

    Args:
        folder: What `cache_outputs` wrote.

    Raises:
        RunFolderError: The folder is missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        document = self._document()
        self.shape: tuple[int, ...] = tuple(document["shape"])
        self.top_k: int | None = document["top_k"]
        self._shards: list[dict[str, Tensor]] = []
        self._places: dict[bytes, tuple[int, int]] = {}
        for number in range(document["shards"]):
            shard = self._shard(number)
            self._shards.append(shard)
            for row, key in enumerate(shard["keys"].numpy()):
                self._places[key.tobytes()] = (number, row)

    @property
    def classes(self) -> int:
        """The size of the last dim of the logits."""
        return self.shape[-1]

    def _document(self) -> dict[str, Any]:
        path = self.folder / DOCUMENT
        if not path.is_file():
            raise RunFolderError(
                f"{self.folder} holds no outputs of a teacher",
                reason=f"it has no {DOCUMENT}" if self.folder.is_dir() else "there is no folder",
                hint="write it with `fxcompress.train.cache_outputs`",
                where=str(self.folder),
            )
        try:
            document: dict[str, Any] = json.loads(path.read_text())
            if document["format"] != FORMAT:
                raise ValueError(f"its format is {document['format']}, not {FORMAT}")
            return {key: document[key] for key in ("shards", "shape", "top_k")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(path, error) from error

    def _shard(self, number: int) -> dict[str, Tensor]:
        path = self.folder / f"shard-{number:05d}.safetensors"
        wanted = {"keys", "logits"}, {"keys", "values", "places"}
        try:
            found: dict[str, Tensor] = load_file(path)
            if set(found) not in wanted:
                raise ValueError(f"it holds {', '.join(sorted(found))}")
            return found
        except (OSError, ValueError, SafetensorError) as error:
            raise self._damaged(path, error) from error

    def _damaged(self, path: Path, error: Exception) -> RunFolderError:
        return RunFolderError(
            "the cached outputs of a teacher are damaged",
            reason=f"{path.name}: {str(error).splitlines()[0]}",
            hint="write them again with `fxcompress.train.cache_outputs`",
            where=str(path),
        )

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return `[batch, …, classes]` in float32 or as they were kept.

        Raises:
            DataError: A sample was not run when the outputs were kept.
        """
        batch: Any = kwargs or args
        found = []
        for row, key in enumerate(_keys(batch).numpy()):
            place = self._places.get(key.tobytes())
            if place is None:
                raise DataError(
                    f"sample {row} of a batch has no cached output of the teacher",
                    reason=f"{len(self._places)} samples were run, and none is equal to it",
                    hint="cache the outputs of this split, without random augmentation and with "
                    "the same padding",
                    where=str(self.folder),
                )
            found.append(self._logits(*place))
        values: Iterable[Any] = batch.values() if isinstance(batch, Mapping) else batch
        device = next((v.device for v in values if isinstance(v, Tensor)), torch.device("cpu"))
        return torch.stack(found).to(device)

    def _logits(self, number: int, row: int) -> Tensor:
        shard = self._shards[number]
        if "logits" in shard:
            return shard["logits"][row]
        values, places = shard["values"][row], shard["places"][row].long()
        unknown = values.new_full((*values.shape[:-1], self.classes), float("-inf"))
        return unknown.scatter(-1, places, values)


def check_cached(cached: CachedOutputs, shape: tuple[int | None, ...]) -> None:
    """Check that kept logits have the sizes of a student's output `[batch, …]`; None is any.

    Raises:
        UsageError: They do not.
    """
    mine, kept = shape[1:], cached.shape
    sizes = zip(mine, kept, strict=False)
    if len(mine) != len(kept) or any(a is not None and a != b for a, b in sizes):
        raise UsageError(
            "the cached outputs are of another model",
            reason=f"they have {list(kept)} values per sample, the student {list(mine)}",
            where=str(cached.folder),
        )
