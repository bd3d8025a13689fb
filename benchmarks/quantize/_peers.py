"""Quantisers of others on the same model: torchao and hqq, on all linear layers but the output.

Neither is a dependency: `pip install --no-deps --target FOLDER torchao hqq termcolor`, and FOLDER
goes to PYTHONPATH.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from fxcompress.spec import Spec
from fxcompress.spec.load_model import build_model

__all__ = ["NAMES", "quantise"]


def _torchao(model: nn.Module, bits: int, group: int) -> None:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_  # type: ignore[import-not-found]
    from torchao.quantization.granularity import PerGroup  # type: ignore[import-not-found]

    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(group)
    )
    quantize_(model, config, filter_fn=lambda module, name: _chosen(name, module))


def _hqq(model: nn.Module, bits: int, group: int) -> None:
    from hqq.core.quantize import (  # type: ignore[import-not-found]
        BaseQuantizeConfig,
        HQQLinear,
    )

    config = BaseQuantizeConfig(nbits=bits, group_size=group)
    for name, module in list(model.named_modules()):
        if _chosen(name, module):
            made = HQQLinear(module, config, compute_dtype=torch.float32, device="cpu")
            model.set_submodule(name, made)


def _chosen(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and name != "lm_head"


_PEERS: Final[dict[str, tuple[str, Callable[[nn.Module, int, int], None]]]] = {
    "torchao": ("torchao", _torchao),
    "hqq of PyPI": ("hqq", _hqq),
}
NAMES: Final = tuple(_PEERS)


def quantise(name: str, spec: Path, bits: int, group: int) -> nn.Module | None:
    """Return the model of a spec quantised by a peer, or None where that is not installed."""
    package, function = _PEERS[name]
    if importlib.util.find_spec(package) is None:
        return None
    model: Any = build_model(Spec.load(spec))
    function(model, bits, group)
    made: nn.Module = model.eval()
    return made
