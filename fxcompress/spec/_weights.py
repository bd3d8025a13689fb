"""Load weights into a model: safetensors or a weights-only state_dict, every key accounted for."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fxcompress.errors import ModelError, NumericsError
from fxcompress.pipeline._close import did_you_mean

__all__ = ["check_finite", "load_weights", "read_state"]

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")


def read_state(path: Path, where: str) -> dict[str, Tensor]:
    """Read a state_dict from safetensors or from a torch file that needs no pickle.

    Raises:
        ModelError: The file is missing, damaged, holds Python objects, or holds no tensors.
    """
    if not path.is_file():
        raise ModelError(f"there is no weights file {path}", where=where)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path.name} needs pickle",
            reason=f"only tensors are loaded, never Python objects ({_first_line(error)})",
            hint="load it where you trust it, and save its state_dict as safetensors: "
            "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')",
            where=where,
        ) from error
    except Exception as error:
        kind = "is damaged or no weights file"
        if path.suffix != ".safetensors" and not zipfile.is_zipfile(path):
            kind = "is no file of torch.save"
        raise ModelError(
            f"{path.name} {kind}",
            reason=f"{type(error).__name__}: {_first_line(error)}",
            where=where,
        ) from error
    return _tensors(loaded, path.name, where)


def _tensors(loaded: object, name: str, where: str) -> dict[str, Tensor]:
    """Return the mapping of tensors in what torch.load gave."""
    for key in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not loaded:
        raise ModelError(
            f"{name} holds a {type(loaded).__name__}",
            reason="it should hold a state_dict: names and tensors",
            where=where,
        )
    odd = [str(key) for key, value in loaded.items() if not isinstance(value, Tensor)]
    if odd:
        raise ModelError(
            f"{name} is not a state_dict",
            reason=f"`{odd[0]}` is a {type(loaded[odd[0]]).__name__}, not a tensor",
            hint="save only model.state_dict()",
            where=where,
        )
    return {str(key): value for key, value in loaded.items()}


def load_weights(model: nn.Module, path: Path, where: str) -> None:
    """Load a file into a model, in place; every key of both sides must be met.

    A tied tensor may stand in the file under one of its names.

    Raises:
        ModelError: Keys are missing or left over, or a tensor has another shape.
    """
    state = read_state(path, where)
    targets = model.state_dict(keep_vars=True)
    groups: dict[int, list[str]] = {}
    for name, tensor in targets.items():
        groups.setdefault(id(tensor), []).append(name)
    missing = [n for n in targets if not any(k in state for k in groups[id(targets[n])])]
    extra = [name for name in state if name not in targets]
    if missing or extra:
        raise _unmatched(path.name, missing, extra, list(targets), where)
    shapes = [
        f"{name} is {tuple(state[name].shape)}, the model's is {tuple(target.shape)}"
        for name, target in targets.items()
        if name in state and state[name].shape != target.shape
    ]
    if shapes:
        raise ModelError(
            f"{_count(shapes, 'tensor')} of {path.name} {_have(shapes)} another shape",
            reason=_listed(shapes),
            hint="do the `args` of the model belong to these weights?",
            where=where,
        )
    for names in groups.values():
        _fill(model, names, targets[names[0]], next(state[n] for n in names if n in state))


def _fill(model: nn.Module, names: list[str], target: Tensor, value: Tensor) -> None:
    """Copy a value into a tensor; one without data is replaced, under all its names."""
    if not target.is_meta:
        with torch.no_grad():
            target.copy_(value)
        return
    made = value.to(target.dtype)
    if isinstance(target, nn.Parameter):
        made = nn.Parameter(made, requires_grad=target.requires_grad)
    for name in names:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, made)


def _unmatched(
    file: str, missing: list[str], extra: list[str], known: list[str], where: str
) -> ModelError:
    """Say which keys do not meet, and the prefix that would make them."""
    parts = []
    if missing:
        parts.append(f"missing: {_listed(missing)}")
    if extra:
        parts.append(f"not in the model: {_listed(extra)}")
    return ModelError(
        f"{file} does not fit the model: {len(missing)} keys missing, {len(extra)} left over",
        reason="; ".join(parts),
        hint=_prefix_hint(missing, extra) or (did_you_mean(extra[0], known) if extra else ""),
        where=where,
    )


def _prefix_hint(missing: list[str], extra: list[str]) -> str:
    """Say whether one prefix on either side makes keys meet."""
    if not missing or not extra:
        return ""
    wanted, given = set(missing), set(extra)
    for name in extra:
        prefix, _, rest = name.partition(".")
        if rest in wanted:
            return f"the file's keys start with `{prefix}.`: save them without"
    for name in missing:
        prefix, _, rest = name.partition(".")
        if rest in given:
            return f"the model's keys start with `{prefix}.`, the file's do not"
    return ""


def check_finite(model: nn.Module, where: str = "") -> None:
    """Refuse NaN in parameters and buffers.

    Raises:
        NumericsError: There is one; the message names the tensors.
    """
    bad = [
        f"{name} ({int(tensor.isnan().sum())} of {tensor.numel()})"
        for name, tensor in _floating(model)
        if bool(tensor.isnan().any())
    ]
    if bad:
        raise NumericsError(
            f"NaN in {_count(bad, 'tensor')} of the model",
            reason=_listed(bad),
            hint="the checkpoint is damaged or its training diverged",
            where=where or None,
        )


def _floating(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return [(n, t.detach()) for n, t in named if t.is_floating_point() and not t.is_meta]


def _listed(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _count(items: list[str], noun: str) -> str:
    return f"{len(items)} {noun}{'' if len(items) == 1 else 's'}"


def _have(items: list[str]) -> str:
    return "has" if len(items) == 1 else "have"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
