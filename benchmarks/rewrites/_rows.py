"""The structural passes of the sweep, each with options that need no data and no choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["FAMILIES", "ROWS", "Row"]


@dataclass(frozen=True)
class Row:
    """A pass with options.

    Attributes:
        steps: As in a spec; the last is the pass that is judged.
        equal: Whether outputs must stay what they were, and gradients of what is left too.
        what: What the options ask for, in words; empty for the default.
    """

    steps: Sequence[Mapping[str, Any]]
    equal: bool = False
    what: str = ""

    @property
    def use(self) -> str:
        """The pass that is judged."""
        return str(self.steps[-1]["use"])


def _one(use: str, /, *, equal: bool = False, what: str = "", **options: Any) -> Row:
    return Row(({"use": use, **options},), equal, what)


ROWS: Final[Mapping[str, Row]] = {
    "tidy.fuse": _one("tidy.fuse", equal=True),
    "tidy.fold_batchnorm": _one("tidy.fold_batchnorm", equal=True),
    "tidy.replace_activation, silu": _one(
        "tidy.replace_activation", replace={"silu": "hardswish"}, what="SiLU by hard swish"
    ),
    "tidy.replace_activation, gelu": _one(
        "tidy.replace_activation", replace={"gelu": "relu"}, what="GELU by ReLU"
    ),
    "prune.channels": _one("prune.channels", ratio=0.25, what="a quarter of each axis"),
    "depth.skip_blocks": _one(
        "depth.skip_blocks", count=1, criterion="random", what="one block, by chance"
    ),
    "depth.merge_layers": _one(
        "depth.merge_layers", groups=[[0, 1]], what="the second block into the first"
    ),
    "depth.share_layers": _one("depth.share_layers", groups=2, what="in pairs"),
    "depth.stochastic": _one("depth.stochastic", equal=True, what="the default, run as deployed"),
    "depth.early_exit": _one(
        "depth.early_exit", after=[0], head="linear", what="after the first block"
    ),
    "moe.lift": _one("moe.lift", equal=True),
    "moe.upcycle": _one("moe.upcycle", equal=True, experts=4, top_k=1, what="one expert of 4"),
    "moe.prune_experts": _one(
        "moe.prune_experts", ratio=0.25, criterion="random", what="a quarter, by chance"
    ),
    "moe.merge_experts": _one(
        "moe.merge_experts", ratio=0.5, calibration=2, what="into half as many"
    ),
    "moe.change_top_k": _one("moe.change_top_k", top_k=1, what="one expert a token"),
    "moe.to_dense": _one("moe.to_dense", calibration=2),
    "depth.mixture_of_depths": _one(
        "depth.mixture_of_depths", capacity=1.0, equal=True, what="all tokens"
    ),
    "factorize.svd": _one("factorize.svd", energy=0.9, calibration=2, what="90 % of the energy"),
    "factorize.tucker": _one("factorize.tucker", ratio=0.5, what="half of the channels"),
    "factorize.cp": _one("factorize.cp", ratio=0.5, iterations=5, what="half of full rank"),
    "factorize.depthwise": _one(
        "factorize.depthwise", multiplier=1, whiten="none", what="one filter a channel"
    ),
    "factorize.embedding": _one("factorize.embedding", rank=8, what="rank 8"),
    "factorize.share_weights": _one("factorize.share_weights", entries=16, iterations=5),
}

# Heading of docs/rewrites.md -> the model of the zoo that stands for the family.
FAMILIES: Final[Mapping[str, str]] = {
    "ResNet": "torchvision/resnet18",
    "MobileNetV2": "timm/mobilenetv2_035",
    "RepVGG": "timm/repvgg_a0",
    "ConvNeXt": "timm/convnext_atto",
    "ViT": "huggingface/vit",
    "Swin": "huggingface/swin",
    "BERT": "huggingface/bert",
    "GPT-2": "huggingface/gpt2",
    "Llama": "huggingface/llama",
    "T5": "huggingface/t5",
    "Mixtral": "huggingface/mixtral",
    "Qwen3-MoE": "huggingface/qwen3_moe",
    "DeepSeek-V3": "huggingface/deepseek_v3",
    "HuBERT": "huggingface/hubert",
}
