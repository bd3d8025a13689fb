"""The lock: what a run decided, and hashes of all it decided from.

`fxcompress.lock.json` is kept in version control beside the spec. Large arrays of decisions are in
`fxcompress.lock.safetensors`, named `<pass id>/<array>`.
"""

from __future__ import annotations

import platform
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError

from fxcompress._files import replaced_file, write_text
from fxcompress.errors import LockError
from fxcompress.pipeline.base import Decision
from fxcompress.pipeline.records import FORMAT_VERSION, Versions

if TYPE_CHECKING:
    from fxcompress.pipeline.context import Context
    from fxcompress.pipeline.steps import Step

__all__ = [
    "DataLock",
    "Lock",
    "PassLock",
    "array_digests",
    "load_arrays",
    "save_arrays",
    "versions",
]

JSON_NAME = "fxcompress.lock.json"
ARRAYS_NAME = "fxcompress.lock.safetensors"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class DataLock(_Part):
    """What was read of one split: how many batches, and the hash of theirs."""

    batches: int
    sha256: str


class PassLock(_Part):
    """One pass's decision, and what it was decided from."""

    id: str
    use: str
    version: int
    options: Mapping[str, Any]
    decision: Mapping[str, Any]
    arrays: tuple[str, ...] = ()


class Lock(_Part):
    """Everything that a result depends on, beside the code of the model.

    Attributes:
        spec: Digest of the spec with all it extends and names.
        model: Digest of the original Program.
        data: Per split, what passes read.
        versions: The software.
        passes: Decisions in order.
    """

    format_version: str = FORMAT_VERSION
    name: str
    spec: str
    model: str
    seed: int
    versions: Versions
    data: Mapping[str, DataLock] = {}
    passes: tuple[PassLock, ...] = ()
    _arrays: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def arrays(self) -> Mapping[str, Any]:
        """The arrays of all decisions, as `<pass id>/<name>`."""
        return self._arrays

    def with_pass(
        self, entry: PassLock, arrays: Mapping[str, Any], data: Mapping[str, Sequence[str]]
    ) -> Lock:
        """Return a lock that also holds this pass's decision and the data read so far."""
        grown = self.model_copy(update={"passes": (*self.passes, entry), "data": data_locks(data)})
        grown._arrays = {**self._arrays, **{f"{entry.id}/{k}": v for k, v in arrays.items()}}
        return grown

    def without(self, steps: Collection[str]) -> Lock:
        """Return a lock that does not hold these passes' decisions."""
        passes = tuple(entry for entry in self.passes if entry.id not in steps)
        less = self.model_copy(update={"passes": passes})
        less._arrays = {k: v for k, v in self._arrays.items() if k.partition("/")[0] not in steps}
        return less

    def decision(self, step: Step) -> Decision:
        """Return the decision that was locked for a step.

        Raises:
            LockError: There is none, or the pass does not understand it any more.
        """
        for entry in self.passes:
            if entry.id == step.id:
                prefix = f"{step.id}/"
                arrays = {
                    name.removeprefix(prefix): array
                    for name, array in self._arrays.items()
                    if name.startswith(prefix)
                }
                return read_decision(step, entry.decision, arrays)
        raise LockError(f"the lock holds no decision of {step.id}", where=step.where or None)

    def save(self, folder: Path) -> Path:
        """Write `fxcompress.lock.json` and, if there are arrays, the safetensors beside it."""
        if self._arrays:
            save_arrays(folder / ARRAYS_NAME, self._arrays)
        return write_text(folder / JSON_NAME, self.model_dump_json(indent=2) + "\n")

    @staticmethod
    def load(path: str | Path) -> Lock:
        """Read a lock file (or the one in a folder).

        Raises:
            LockError: It is missing, damaged or of a newer format.
        """
        path = Path(path)
        path = path / JSON_NAME if path.is_dir() else path
        try:
            lock = Lock.model_validate_json(path.read_bytes())
        except FileNotFoundError as error:
            raise LockError(
                "there is no lock file",
                hint="run without --locked once and keep the lock it writes",
                where=str(path),
            ) from error
        except (OSError, ValidationError) as error:
            raise LockError(
                "the lock file cannot be read", reason=_first_line(error), where=str(path)
            ) from error
        if any(entry.arrays for entry in lock.passes):
            lock._arrays = load_arrays(path.with_name(ARRAYS_NAME))
        return lock

    def drift(self, now: Lock, steps: Iterable[Step]) -> tuple[str, ...]:
        """Say, one sentence each, how this lock differs from what is here now.

        Args:
            now: A lock of the present spec, model, data and software, without decisions.
            steps: The present pipeline.
        """
        found: list[str] = []
        for what in ("spec", "model", "seed"):
            was, is_ = getattr(self, what), getattr(now, what)
            if was != is_:
                found.append(f"the {what} changed: {_short(was)} locked, {_short(is_)} here")
        for package in ("fxcompress", "torch", "python"):
            was, is_ = getattr(self.versions, package), getattr(now.versions, package)
            if was != is_:
                found.append(f"{package} is {is_}, and {was} is locked")
        for split, seen in now.data.items():
            if split in self.data and self.data[split] != seen:
                found.append(f"the data of split {split} changed")
        return (*found, *_pass_drift(self.passes, tuple(steps)))


def _pass_drift(locked: Sequence[PassLock], steps: Sequence[Step]) -> list[str]:
    ids = [entry.id for entry in locked], [step.id for step in steps]
    if ids[0] != ids[1]:
        return [f"the passes are {', '.join(ids[1])}, and {', '.join(ids[0])} are locked"]
    found: list[str] = []
    for entry, step in zip(locked, steps, strict=True):
        version = type(step.pass_).version
        if entry.use != step.use:
            found.append(f"pass {step.id} is {step.use}, and {entry.use} is locked")
        elif entry.version != version:
            found.append(f"{step.use} has version {version}, and {entry.version} is locked")
        elif dict(entry.options) != step.options.model_dump(mode="json"):
            found.append(f"the options of pass {step.id} changed")
    return found


def versions() -> Versions:
    """Return the versions of fxcompress, torch and Python in use."""
    from importlib.metadata import version

    python = ".".join(platform.python_version_tuple()[:2])
    return Versions(fxcompress=version("fxcompress"), torch=version("torch"), python=python)


def data_locks(read: Mapping[str, Sequence[str]]) -> dict[str, DataLock]:
    """Return what was read of each split, from the digests of its batches."""
    import hashlib

    return {
        split: DataLock(
            batches=len(digests), sha256=hashlib.sha256("".join(digests).encode()).hexdigest()
        )
        for split, digests in sorted(read.items())
        if digests
    }


def data_now(lock: Lock, context: Context) -> dict[str, DataLock]:
    """Read as many batches as are locked, of each split that is here, and return their hashes."""
    from fxcompress.pipeline.context import Context as Fresh

    reader = Fresh(data=context.data)
    for split, seen in lock.data.items():
        if context.has(split):
            for _ in reader.batches(split, seen.batches):
                pass
    return data_locks(reader.read)


def read_decision(step: Step, document: Mapping[str, Any], arrays: Mapping[str, Any]) -> Decision:
    """Return a decision from its JSON and arrays.

    Raises:
        LockError: The pass does not understand it.
    """
    import json

    cls = type(step.pass_).Decision
    try:
        # Strict models take tuples for tuples only in JSON mode.
        decision = cls.model_validate_json(json.dumps(dict(document)))
    except ValidationError as error:
        raise LockError(
            f"the locked decision of {step.id} does not fit {step.use}",
            reason=_first_line(error),
            hint="run without --locked to decide again",
            where=step.where or None,
        ) from error
    return decision.model_copy(update={"arrays": dict(arrays)})


def array_digests(arrays: Mapping[str, Any]) -> dict[str, str]:
    """Return the SHA-256 of each array of a decision."""
    import torch

    from fxcompress.ir import hash_tensor

    return {name: hash_tensor(torch.as_tensor(arrays[name])) for name in sorted(arrays)}


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write tensors or numpy arrays as safetensors, atomically."""
    import torch

    from fxcompress._tensor_files import write_tensors

    with replaced_file(path) as temporary:
        write_tensors(temporary, {name: torch.as_tensor(array) for name, array in arrays.items()})


def load_arrays(path: Path) -> dict[str, Any]:
    """Read tensors from safetensors.

    Raises:
        LockError: The file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise LockError(
            "the arrays of the decisions cannot be read",
            reason=_first_line(error),
            where=str(path),
        ) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _short(value: object) -> str:
    return str(value)[:12] or "none"
