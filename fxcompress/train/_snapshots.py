"""Snapshots of a training, from which a killed one goes on as if nothing had happened.

    step-00000120/
        training.json          where it is, what it did, and everything that is no tensor
        tensors.safetensors    model, optimiser, generators

A snapshot appears as a whole or not at all, and the one before it is removed only then.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fxcompress._files import cannot_write, replaced_folder, write_text
from fxcompress._tensor_files import write_tensors
from fxcompress.errors import RunFolderError
from fxcompress.train._sharding import like

__all__ = ["Snapshot", "Snapshots", "load_optimizer", "optimizer_state"]

DOCUMENT, TENSORS = "training.json", "tensors.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class Snapshot:
    """One state of a training: nested plain data whose leaves may be tensors."""

    step: int
    state: Any


class Snapshots:
    """The snapshots of one training, of which the last is kept.

    Args:
        folder: Where they are; made when the first is written. None keeps nothing.
        identity: What tells this training from others; each must fit on one line.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, str]) -> None:
        self.folder, self.identity = folder, dict(identity)

    def write(self, step: int, state: Any) -> None:
        """Write the state after a step, and remove older ones.

        Raises:
            RunFolderError: The disk is full, or the folder cannot be written.
        """
        if self.folder is None:
            return
        tensors: dict[str, Tensor] = {}
        encoded = _encode(state, tensors, "state")
        path = self.folder / f"step-{step:08d}"
        with replaced_folder(path) as folder:
            digest = write_tensors(folder / TENSORS, tensors)
            document = {"format": FORMAT, "step": step, "identity": self.identity,
                        "tensors": digest, "state": encoded}  # fmt: skip
            write_text(folder / DOCUMENT, json.dumps(document, indent=1) + "\n")
        for old in self._paths():
            if old != path:
                _remove(old)

    def last(self) -> Path | None:
        """Return the folder of the last snapshot, or None."""
        return max(self._paths(), default=None)

    def read(self) -> Snapshot | None:
        """Read the last snapshot; None where there is none.

        Raises:
            RunFolderError: It is damaged, or of another training.
        """
        path = self.last()
        if path is None:
            return None
        try:
            document = json.loads((path / DOCUMENT).read_text())
            self._check(document, path)
            if hashlib.sha256((path / TENSORS).read_bytes()).hexdigest() != document["tensors"]:
                raise ValueError("the tensors are not those that were written")
            tensors = load_file(path / TENSORS)
            return Snapshot(document["step"], _decode(document["state"], tensors))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise RunFolderError(
                "the snapshot of a training is damaged",
                reason=str(error).splitlines()[0],
                hint="remove it to train from the beginning",
                where=str(path),
            ) from error

    def _check(self, document: Mapping[str, Any], path: Path) -> None:
        found = {"format": str(document["format"]), **document["identity"]}
        here = {"format": str(FORMAT), **self.identity}
        differs = [
            f"{name} was {found.get(name, 'nothing')} and is {here.get(name, 'nothing')}"
            for name in sorted(found.keys() | here.keys())
            if found.get(name) != here.get(name)
        ]
        if differs:
            raise RunFolderError(
                "the snapshot is of another training",
                reason="; ".join(differs),
                hint="remove it to train from the beginning, or train in another folder",
                where=str(path),
            )

    def _paths(self) -> list[Path]:
        return [] if self.folder is None else sorted(self.folder.glob("step-*"))


def optimizer_state(optimizer: torch.optim.Optimizer) -> Any:
    """Return an optimiser's state, its parameters named by their place."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    # `Optimizer.load_state_dict` would round state to the parameters' dtype: it is not used.
    return {"groups": groups, "state": [dict(optimizer.state[p]) for p in parameters]}


def load_optimizer(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Give an optimiser the state that `optimizer_state` returned, tensor by tensor."""
    for group, found in zip(optimizer.param_groups, state["groups"], strict=True):
        group.update(found)
    kept = iter(state["state"])
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found = {key: _at_home(key, v, parameter, group) for key, v in next(kept).items()}
            if found:
                optimizer.state[parameter] = found


def _at_home(key: str, value: Any, parameter: Tensor, group: Mapping[str, Any]) -> Any:
    """Return a value on its parameter's device; a step counter stays on the CPU unless fused."""
    counts = key == "step" and not (group.get("fused") or group.get("capturable"))
    if not isinstance(value, Tensor) or counts:
        return value
    return like(value.to(parameter.device), parameter)


def _encode(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """Return JSON that stands for nested plain data; tensors are put aside by name."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, Mapping):
        items = [[key, _encode(item, tensors, f"{name}.{key}")] for key, item in value.items()]
        return {"map": items}
    if isinstance(value, tuple | list):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_encode(item, tensors, f"{name}.{i}") for i, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise RunFolderError(
        f"a training with a {type(value).__name__} in its state cannot be kept",
        reason=f"{name} is {value!r}",
        hint="choose another optimiser or scheduler",
    )


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "map":
        return {key: _decode(item, tensors) for key, item in content}
    decoded = [_decode(item, tensors) for item in content]
    return tuple(decoded) if kind == "tuple" else decoded


def _remove(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except OSError as error:
        raise cannot_write(path, error) from error
