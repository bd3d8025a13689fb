"""Quantisers of others on the same model, on all linear layers but the output.

None is a dependency: `pip install --no-deps --target FOLDER torchao hqq termcolor`, and FOLDER goes
to PYTHONPATH; so does that of `gptqmodel device-smi pypcre tokenicer logbar defuser threadpoolctl
accelerate datasets dill`, with GPTQMODEL_CPU_WORKERS=2; nncf has an environment of its own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

__all__ = ["NAMES", "quantise"]

Batches: TypeAlias = Sequence[Mapping[str, Tensor]]


def _torchao(model: nn.Module, bits: int, group: int | None, batches: Batches) -> None:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_  # type: ignore[import-not-found]
    from torchao.quantization.granularity import (  # type: ignore[import-not-found]
        PerAxis,
        PerGroup,
    )

    each = PerAxis(0) if group is None else PerGroup(group)
    config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=each)
    quantize_(model, config, filter_fn=lambda module, name: _chosen(name, module))


def _hqq(model: nn.Module, bits: int, group: int | None, batches: Batches) -> None:
    from hqq.core.quantize import (  # type: ignore[import-not-found]
        BaseQuantizeConfig,
        HQQLinear,
    )

    config = BaseQuantizeConfig(nbits=bits, group_size=group)
    for name, module in list(model.named_modules()):
        if _chosen(name, module):
            made = HQQLinear(module, config, compute_dtype=torch.float32, device="cpu")
            model.set_submodule(name, made)


def _nncf(model: nn.Module, bits: int, group: int | None, batches: Batches) -> None:
    """AWQ and scale estimation on the calibration windows; a group that does not fit is adjusted.

    Its GPTQ is for OpenVINO models only, and so are its 3 bits; 8 take no data.
    """
    import nncf  # type: ignore[import-not-found]

    modes = nncf.CompressWeightsMode
    mode = {8: modes.INT8_ASYM, 4: modes.INT4_ASYM}[bits]
    dataset = nncf.Dataset([dict(each) for each in batches])
    advanced = nncf.AdvancedCompressionParameters(
        group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
    )
    settings = {
        "ratio": 1.0,
        "group_size": group or -1,
        "subset_size": len(batches),
        "awq": True,
        "scale_estimation": True,
        "backup_mode": nncf.BackupMode.NONE,
        "advanced_parameters": advanced,
    }
    nncf.compress_weights(model, mode=mode, dataset=dataset, **(settings if bits < 8 else {}))


def _gptqmodel(model: nn.Module, bits: int, group: int | None, batches: Batches) -> nn.Module:
    """Its defaults (symmetric, static groups ordered by activation) on the calibration windows.

    It takes models from folders. What it packs is read back, which computes the same sooner.
    """
    from gptqmodel import GPTQModel, QuantizeConfig  # type: ignore[import-not-found]
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear  # type: ignore[import-not-found]
    from transformers import PreTrainedTokenizerFast

    config = QuantizeConfig(
        bits=bits, group_size=group or -1, pack_impl="original", offload_to_disk=False
    )
    with TemporaryDirectory() as folder:
        owner: Any = model
        owner.save_pretrained(folder)
        words = PreTrainedTokenizerFast(tokenizer_object=_tokenizer(), pad_token="<|im_end|>")
        words.save_pretrained(folder)
        loaded = GPTQModel.load(folder, config, device="cpu", dtype=torch.float32)
        loaded.quantize(
            [{**each, "attention_mask": torch.ones_like(each["input_ids"])} for each in batches],
            batch_size=1,
        )
    made: nn.Module = loaded.model
    for name, module in list(made.named_modules()):
        if isinstance(module, BaseQuantLinear):
            linear = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            linear.weight = nn.Parameter(module.dequantize_weight().T.float(), requires_grad=False)
            made.set_submodule(name, linear)
    return made


def _tokenizer() -> Any:
    file = Path(__file__).parents[2] / "specs" / "smollm2" / "model.py"
    spec = importlib.util.spec_from_file_location("specs_smollm2", file)
    assert spec is not None, "the file is there"
    assert spec.loader is not None, "it is Python"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.tokenizer()


def _chosen(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and name != "lm_head"


# A peer changes the model it is given, or returns another.
Quantise: TypeAlias = Callable[[nn.Module, int, int | None, Batches], nn.Module | None]

_PEERS: Final[dict[str, tuple[str, Quantise]]] = {
    "torchao": ("torchao", _torchao),
    "hqq of PyPI": ("hqq", _hqq),
    "nncf": ("nncf", _nncf),
    "gptqmodel": ("gptqmodel", _gptqmodel),
}
NAMES: Final = tuple(_PEERS)


def quantise(
    name: str,
    build: Callable[[], Any],
    bits: int,
    group: int | None,
    batches: Batches,
) -> nn.Module | None:
    """Return a model quantised by a peer, or None where that is not installed.

    Args:
        name: Of the peer.
        build: Makes the model, which the peer may change.
        bits: Width of the integers.
        group: Weights that share a scale; None: a row.
        batches: Calibration data, the model's inputs by name.
    """
    package, function = _PEERS[name]
    if importlib.util.find_spec(package) is None:
        return None
    model: Any = build()
    made: nn.Module = function(model, bits, group, batches) or model
    return made.eval()
