"""Checkpoints: after every pass the graph, the tensors that changed, the decision and the record.

    checkpoints/00-original/          the Program as it was given
    checkpoints/01-<id>/
        program.json                  the graph, without tensors
        state.safetensors             tensors that this pass changed or added
        decision.safetensors          arrays of the decision that are not in the state anyway
        record.json                   PassRecord
        manifest.json                 decision, hashes of the files, and where every tensor is

A checkpoint appears as a whole (written aside, synced, renamed) or not at all.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open

from fxcompress._files import replaced_folder, write_text
from fxcompress._tensor_files import write_tensors
from fxcompress.errors import FxCompressError, RunFolderError
from fxcompress.ir.storage import graph_to_json, program_from_json
from fxcompress.pipeline.lock import PassLock, load_arrays, save_arrays
from fxcompress.pipeline.records import FORMAT_VERSION, PassRecord
from fxcompress.rewrite._modules import ModuleTree

if TYPE_CHECKING:
    from fxcompress.ir import Program

__all__ = ["Checkpoint", "Checkpoints"]

ORIGINAL = "00-original"
GRAPH, STATE, ARRAYS = "program.json", "state.safetensors", "decision.safetensors"
RECORD, MANIFEST = "record.json", "manifest.json"


class Manifest(BaseModel):
    """What a checkpoint holds.

    Attributes:
        tensors: Name of every tensor -> the checkpoint whose file has it, and its name there.
        arrays: Array of the decision -> the tensor of this state that is the same in memory.
        files: Hash of each file.
        entry: The pass's decision; None for the original.
        read: Digests of the batches read so far, per split.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: str = FORMAT_VERSION
    tensors: Mapping[str, tuple[str, str]]
    arrays: Mapping[str, str] = {}
    files: Mapping[str, str]
    entry: PassLock | None = None
    read: Mapping[str, tuple[str, ...]] = {}


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, read."""

    name: str
    manifest: Manifest
    record: PassRecord | None
    arrays: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one run, in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._where: dict[int, tuple[str, str]] = {}
        self._alive: dict[int, torch.Tensor] = {}

    def write(
        self,
        program: Program,
        *,
        index: int = 0,
        record: PassRecord | None = None,
        entry: PassLock | None = None,
        arrays: Mapping[str, Any] | None = None,
        read: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Write the state after a pass (index 0: the original).

        Raises:
            RunFolderError: The disk is full, or the folder cannot be written; what was there stays.
        """
        name = ORIGINAL if record is None else f"{index:02d}-{record.id}"
        state = program.state()
        known = {id(t): self._where[id(t)] for t in state.values() if id(t) in self._where}
        fresh: dict[str, torch.Tensor] = {}
        for key, tensor in state.items():
            if id(tensor) not in known:
                known[id(tensor)] = (name, key)
                fresh[key] = tensor
        with replaced_folder(self.folder / name) as folder:
            hashes = {GRAPH: _write_json(folder / GRAPH, graph_to_json(program, foreign=True))}
            hashes[STATE] = write_tensors(folder / STATE, fresh)
            shared = _shared(arrays or {}, fresh)
            own = {key: array for key, array in (arrays or {}).items() if key not in shared}
            if own:
                save_arrays(folder / ARRAYS, own)
                hashes[ARRAYS] = _sha(folder / ARRAYS)
            if record is not None:
                hashes[RECORD] = _write_json(folder / RECORD, record.model_dump(mode="json"))
            manifest = Manifest(
                tensors={key: known[id(tensor)] for key, tensor in state.items()},
                arrays=shared,
                files=hashes,
                entry=entry,
                read={split: tuple(each) for split, each in (read or {}).items()},
            )
            write_text(folder / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
        # Identities stay valid only for as long as the tensors live.
        self._where, self._alive = known, {id(t): t for t in state.values()}

    def remove(self, index: int, step: str) -> None:
        """Remove the checkpoint of a pass that was undone.

        Raises:
            RunFolderError: It cannot be removed.
        """
        folder = self.folder / f"{index:02d}-{step}"
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise RunFolderError(
                "a checkpoint cannot be removed", reason=str(error), where=str(folder)
            ) from error

    def completed(self, steps: Sequence[str]) -> list[Checkpoint]:
        """Return the original's checkpoint and those of the leading steps that are complete.

        Raises:
            RunFolderError: One is damaged.
        """
        found: list[Checkpoint] = []
        names = [ORIGINAL, *(f"{i:02d}-{step}" for i, step in enumerate(steps, start=1))]
        for name in names:
            if not (self.folder / name / MANIFEST).exists():
                break
            found.append(self.read(name))
        return found

    def read(self, name: str) -> Checkpoint:
        """Read a checkpoint's documents, not its Program.

        Raises:
            RunFolderError: It is damaged.
        """
        folder = self.folder / name
        manifest = self._manifest(name)
        try:
            for file, expected in manifest.files.items():
                if _sha(folder / file) != expected:
                    raise _damaged(folder / file, "its hash is not the one that was written")
            record = None
            if RECORD in manifest.files:
                record = PassRecord.model_validate_json((folder / RECORD).read_bytes())
            arrays = self._arrays(name, manifest)
        except (OSError, ValidationError, SafetensorError) as error:
            raise _damaged(folder, str(error).splitlines()[0]) from error
        return Checkpoint(name, manifest, record, arrays)

    def arrays(self, index: int, step: str) -> dict[str, Any]:
        """Return the arrays of a pass's decision, read from its files where they are used.

        Raises:
            RunFolderError: The checkpoint is damaged.
        """
        name = f"{index:02d}-{step}"
        try:
            return self._arrays(name, self._manifest(name))
        except (OSError, SafetensorError) as error:
            raise _damaged(self.folder / name, str(error).splitlines()[0]) from error

    def load(
        self, checkpoint: Checkpoint, original: Program | None = None, *, remember: bool = False
    ) -> Program:
        """Build the Program of a checkpoint.

        Args:
            checkpoint: Which.
            original: Gives the modules of a user's class, of which a checkpoint holds no code.
            remember: The next checkpoint will refer to this one's tensors.

        Raises:
            RunFolderError: It is damaged.
        """
        import json

        try:
            document = json.loads((self.folder / checkpoint.name / GRAPH).read_text())
            tensors = self._tensors(checkpoint.manifest.tensors)
            foreign = {} if original is None else _called(original)
            program = program_from_json(document, tensors, foreign=foreign)
        except (OSError, ValueError, KeyError, SafetensorError, FxCompressError) as error:
            raise _damaged(self.folder / checkpoint.name, str(error).splitlines()[0]) from error
        if remember:
            state = program.state()
            self._where = {id(t): checkpoint.manifest.tensors[key] for key, t in state.items()}
            self._alive = {id(t): t for t in state.values()}
        return program

    def map_original(self, program: Program) -> None:
        """Let the original's weights on the CPU be read from its checkpoint.

        Their values stay the same, and memory is taken only for what is read; mapping them again
        gives that memory back.

        Raises:
            RunFolderError: The checkpoint is damaged.
        """
        places = self._manifest(ORIGINAL).tensors
        mapped = self._tensors(places)
        tree = ModuleTree(program.module)
        wrapped: dict[tuple[str, str], torch.Tensor] = {}
        for name, tensor in program.state().items():
            if tensor.device.type == "cpu":
                value = wrapped.setdefault(places[name], _like(mapped[name], tensor))
                tree.set_tensor(name, value)
                if self._alive.pop(id(tensor), None) is not None:
                    self._where[id(value)] = self._where.pop(id(tensor))
                    self._alive[id(value)] = value

    def _manifest(self, name: str) -> Manifest:
        path = self.folder / name / MANIFEST
        try:
            return Manifest.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise _damaged(path, str(error).splitlines()[0]) from error

    def _arrays(self, name: str, manifest: Manifest) -> dict[str, Any]:
        folder = self.folder / name
        found = load_arrays(folder / ARRAYS) if ARRAYS in manifest.files else {}
        if manifest.arrays:
            with safe_open(str(folder / STATE), framework="pt") as file:
                found.update({key: file.get_tensor(at) for key, at in manifest.arrays.items()})
        return found

    def _tensors(self, places: Mapping[str, tuple[str, str]]) -> dict[str, torch.Tensor]:
        """Read tensors, each once however many names it has."""
        wanted: dict[str, set[str]] = {}
        for name, key in places.values():
            wanted.setdefault(name, set()).add(key)
        read: dict[tuple[str, str], torch.Tensor] = {}
        for name, keys in wanted.items():
            with safe_open(str(self.folder / name / STATE), framework="pt") as file:
                for key in keys:
                    read[(name, key)] = file.get_tensor(key)
        return {name: read[place] for name, place in places.items()}


def _shared(arrays: Mapping[str, Any], fresh: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return which arrays are tensors of the state: what was trained is both."""
    places = {_place(tensor): key for key, tensor in fresh.items() if tensor.numel()}
    found = {key: places.get(_place(array)) for key, array in arrays.items()}
    return {key: at for key, at in found.items() if at is not None}


def _place(array: Any) -> object:
    if not isinstance(array, torch.Tensor):
        return None
    return array.data_ptr(), array.device, array.dtype, array.shape, array.stride()


def _like(value: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return a value as the parameter or buffer that it stands for."""
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(value, requires_grad=tensor.requires_grad)
    return value


def _called(program: Program) -> dict[str, torch.nn.Module]:
    """Return the modules that a Program calls, by path."""
    nodes = program.graph.find_nodes(op="call_module")
    return {str(node.target): program.module.get_submodule(str(node.target)) for node in nodes}


def _write_json(path: Path, document: object) -> str:
    import json

    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    write_text(path, text)
    return hashlib.sha256(text.encode()).hexdigest()


def _sha(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(path: Path, reason: str) -> RunFolderError:
    return RunFolderError(
        "a checkpoint is damaged",
        reason=reason,
        hint="start the run again with --force, or in another folder",
        where=str(path),
    )
