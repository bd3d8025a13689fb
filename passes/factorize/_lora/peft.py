"""Read an adapter from files in PEFT's layout."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor

from fxcompress.errors import SelectorError, UsageError
from fxcompress.pipeline._close import did_you_mean

if TYPE_CHECKING:
    from passes.factorize._lora.layers import Layer

__all__ = ["Loaded", "load_adapter"]

_PREFIX: Final = "base_model.model."
# Key names after the layer's path -> ours, and whether the tensor is the transpose of ours.
_KEYS: Final = {
    "lora_A.weight": ("A.weight", False),
    "lora_B.weight": ("B.weight", False),
    "lora_embedding_A": ("A.weight", True),
    "lora_embedding_B": ("B.weight", False),
    "lora_magnitude_vector": ("magnitude", False),
    "lora_magnitude_vector.weight": ("magnitude", False),
}


@dataclass(frozen=True)
class Loaded:
    """An adapter from files.

    Attributes:
        tensors: Path of a layer -> `A.weight`, `B.weight` and perhaps `magnitude`.
        config: What adapter_config.json says.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    config: Mapping[str, Any]

    @property
    def dora(self) -> bool:
        """Whether there are magnitudes."""
        return bool(self.config.get("use_dora"))

    def scale(self, path: str, rank: int) -> float:
        """Return s of a layer: alpha / rank, or alpha / √rank, by patterns or for all."""
        alpha = self.config.get("lora_alpha", 8)
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                alpha = value
                break
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def load_adapter(folder: Path, layers: Iterable[Layer], state: Mapping[str, Tensor]) -> Loaded:
    """Read an adapter's files and match them with a Program's layers.

    Raises:
        UsageError: A file is missing, damaged, or holds what is no plain LoRA; or a shape differs.
        SelectorError: It adapts a layer that is not there.
    """
    config = _config(folder)
    raw = _tensors(folder / "adapter_model.safetensors")
    known = {layer.path: layer for layer in layers}
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in raw.items():
        path, name, transposed = _parsed(key, folder)
        if path not in known:
            raise SelectorError(
                f"the adapter is for a layer {path}, which is not there",
                reason=f"{folder} was made for another model, or for one wrapped otherwise",
                hint=did_you_mean(path, known, kind="there are"),
            )
        found.setdefault(path, {})[name] = tensor.t().contiguous() if transposed else tensor
    for path, tensors in found.items():
        _check(path, tensors, known[path], state, dora=bool(config.get("use_dora")))
    order = {path: found[path] for path in known if path in found}
    return Loaded(order, config)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read",
            reason=str(error),
            hint="name the folder that `save_pretrained` of an adapter wrote",
        ) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise UsageError(f"{path} describes {kind}, not LORA")
    for name in ("bias", "lora_bias", "modules_to_save"):
        if config.get(name) not in (None, "none", False, []):
            raise UsageError(
                f"the adapter in {folder} trains more than low-rank products",
                reason=f"it says `{name}: {config[name]}`",
                hint="save an adapter without it",
            )
    return config


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        older = path.with_name("adapter_model.bin")
        raise UsageError(
            f"{path} cannot be read",
            reason=str(error),
            hint=f"{older.name} is a pickle: save it as safetensors" if older.exists() else "",
        ) from error


def _parsed(key: str, folder: Path) -> tuple[str, str, bool]:
    """Return the layer, our name of the tensor, and whether it is transposed."""
    for suffix, (name, transposed) in _KEYS.items():
        if key.endswith(f".{suffix}"):
            path = key.removesuffix(f".{suffix}").removeprefix(_PREFIX)
            return path, name, transposed
    raise UsageError(
        f"the adapter in {folder} holds {key}",
        reason="it is no part of a low-rank product",
        hint=f"known are {', '.join(_KEYS)}",
    )


def _check(
    path: str,
    tensors: Mapping[str, Tensor],
    layer: Layer,
    state: Mapping[str, Tensor],
    *,
    dora: bool,
) -> None:
    weight = state[layer.weight]
    needed = {"A.weight", "B.weight"} | ({"magnitude"} if dora else set())
    if set(tensors) != needed:
        odd = ", ".join(sorted(needed ^ set(tensors)))
        raise UsageError(f"the adapter of {path} has too much or too little", reason=odd)
    down, up = tensors["A.weight"], tensors["B.weight"]
    shape = tuple(map(int, weight.shape))
    rank = int(up.shape[1])
    wanted: tuple[tuple[int, ...], tuple[int, ...]]
    if layer.op == "embedding":
        wanted = ((shape[0], rank), (shape[1], rank))
    elif layer.op == "addmm":
        wanted = ((rank, shape[0]), (shape[1], rank))
    else:
        wanted = ((rank, *shape[1:]), (shape[0], rank, *(1 for _ in shape[2:])))
    got = (tuple(down.shape), tuple(up.shape))
    if got != wanted:
        raise UsageError(
            f"the adapter of {path} does not fit its weight {list(shape)}",
            reason=f"A and B are {got[0]} and {got[1]}, not {wanted[0]} and {wanted[1]}",
            where=path,
        )
