"""The models of the speed benchmark, and those whose size grows to show how time grows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.zoo import Inputs
from fxcompress._torchvision import declare_operators

__all__ = ["GROWING", "MODELS", "Case"]


@dataclass(frozen=True)
class Case:
    """A model, its example, which sizes are dynamic, and whether whole heads go (text)."""

    model: nn.Module
    inputs: Inputs
    dynamic: Any = "batch"
    text: bool = False


def _vision(name: str, size: int = 64) -> Callable[[], Case]:
    def build() -> Case:
        declare_operators()
        import torchvision

        arguments = {"image_size": size} if name.startswith("vit") else {}
        model = torchvision.models.get_model(name, weights=None, **arguments)
        return Case(model.eval(), ((torch.randn(2, 3, size, size),), {}))

    return build


def llama(layers: int, hidden: int = 256, key_value_heads: int = 8) -> Case:
    """Build a Llama shape; as many key as query heads, for Torch-Pruning does not end on fewer."""
    declare_operators()
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=key_value_heads,
        vocab_size=1024,
        use_cache=False,
    )
    ids = torch.randint(0, 1024, (2, 16))
    dynamic: Mapping[str, Mapping[int, str]] = {"input_ids": {0: "batch", 1: "seq"}}
    return Case(LlamaForCausalLM(config).eval(), ((), {"input_ids": ids}), dynamic, text=True)


MODELS: dict[str, Callable[[], Case]] = {
    "ResNet-50": _vision("resnet50"),
    "ViT-B/16": _vision("vit_b_16"),
    "Swin-T": _vision("swin_t"),
    "ConvNeXt-T": _vision("convnext_tiny"),
    "Llama, 12 layers": lambda: llama(12),
}
GROWING: dict[str, dict[str, Callable[[], Case]]] = {
    "DenseNet": {f"DenseNet-{n}": _vision(f"densenet{n}") for n in (121, 169, 201)},
    "Llama": {f"Llama, {n} layers": lambda n=n: llama(n, 64) for n in (12, 25, 50, 100)},
}
