"""Programs as files (`.fxp`): one zip of a JSON document and safetensors, no pickle."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fxcompress._torchvision import declare_operators
from fxcompress.errors import FxCompressError, ModelError
from fxcompress.ir._document import VERSION, graph_to_json, program_from_json, stored_tensors
from fxcompress.ir._packing import pack_weights, unpack_weights

if TYPE_CHECKING:
    from fxcompress.ir.program import Program

__all__ = ["graph_to_json", "load", "program_from_json", "save", "stored_tensors"]

_DOCUMENT: Final = "program.json"
_TENSORS: Final = "state.safetensors"
# Zip knows no earlier time; a fixed one makes equal programs equal bytes.
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)


def save(program: Program, path: Path) -> Path:
    """Write a program to one file, all or nothing; equal programs give equal bytes.

    Raises:
        ModelError: The program holds what has no name, or the file cannot be written.
    """
    written = graph_to_json(program)
    tensors, packed = pack_weights(program, stored_tensors(program))
    if packed:
        written = {**written, "version": VERSION, "packed": packed}
    document = json.dumps(written, separators=(",", ":"), ensure_ascii=False)
    try:
        with _replacing(path) as file, tempfile.TemporaryDirectory(dir=path.parent) as folder:
            weights = Path(folder) / _TENSORS
            save_file(_separate(tensors), weights)
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                archive.writestr(_entry(_DOCUMENT), document)
                entry = _entry(_TENSORS)
                with weights.open("rb") as source, archive.open(entry, "w", force_zip64=True) as to:
                    shutil.copyfileobj(source, to, 1 << 20)
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(f"cannot write {path}", reason=str(error), where=str(path)) from error
    return path


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.create_system = 3
    entry.external_attr = 0o644 << 16
    return entry


def _separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return contiguous tensors on the CPU, no two in one storage, as safetensors demands."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.numel() * tensor.element_size()
        alone = storage.data_ptr() not in seen and whole
        seen.add(storage.data_ptr())
        placed = tensor.cpu().contiguous()
        result[name] = placed if alone else placed.clone()
    return result


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a new file beside `path` that takes its place when all is written and on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load(path: Path) -> Program:
    """Read a program from a file: modules are rebuilt, types recomputed, everything verified.

    Raises:
        ModelError: The file is missing, damaged, or of a newer format.
    """
    # The output's class may live in a library that imports torchvision.
    declare_operators()
    try:
        with zipfile.ZipFile(path) as archive:
            document: dict[str, Any] = json.loads(archive.read(_DOCUMENT))
            with tempfile.TemporaryDirectory() as folder:
                weights = Path(folder) / _TENSORS
                with archive.open(_TENSORS) as source, weights.open("wb") as to:
                    shutil.copyfileobj(source, to, 1 << 20)
                tensors = load_file(weights)
        return program_from_json(document, unpack_weights(document, tensors))
    except FileNotFoundError as error:
        raise ModelError("the file does not exist", where=str(path)) from error
    except FxCompressError as error:
        raise ModelError(
            error.what, reason=error.reason, hint=error.hint, where=str(path)
        ) from error
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, SafetensorError) as error:
        raise ModelError(
            "the file is damaged or no saved program",
            reason=f"{type(error).__name__}: {error}",
            hint="save the program again",
            where=str(path),
        ) from error
