"""Capture (eval and train, verification aside) against bare `torch.export.export`.

python -m benchmarks.capture_speed [--repeats 5]
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable

import torch

import fxcompress as fxc
from benchmarks._common import interleaved, median, write_table
from fxcompress._torchvision import declare_operators

Case = tuple[torch.nn.Module, tuple[torch.Tensor, ...], dict[str, dict[int, str]]]


def resnet50() -> Case:
    declare_operators()
    from torchvision.models import resnet50

    return resnet50(weights=None).eval(), (torch.randn(2, 3, 224, 224),), {"x": {0: "batch"}}


def vit_b_16() -> Case:
    declare_operators()
    from torchvision.models import vit_b_16

    return vit_b_16(weights=None).eval(), (torch.randn(2, 3, 224, 224),), {"x": {0: "batch"}}


def llama_12() -> Case:
    declare_operators()
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=4096, use_cache=False,
    )  # fmt: skip
    ids = torch.randint(0, 4096, (2, 32))
    dynamic = {"input_ids": {0: "batch", 1: "seq"}}
    return LlamaForCausalLM(config).eval(), (ids,), dynamic


def export(
    model: torch.nn.Module, args: tuple[torch.Tensor, ...], dynamic: dict[str, dict[int, str]]
) -> None:
    shapes = ({dim: torch.export.Dim.DYNAMIC for dim in next(iter(dynamic.values()))},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.export(model, args, dynamic_shapes=shapes, strict=False)


CASES: dict[str, Callable[[], Case]] = {
    "ResNet-50": resnet50,
    "ViT-B/16": vit_b_16,
    "Llama, 12 layers": llama_12,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, make in CASES.items():
        model, args, dynamic = make()
        times = interleaved(
            {
                "capture": lambda m=model, a=args, d=dynamic: fxc.capture(
                    m, a, dynamic=d, verify=False
                ),
                "export": lambda m=model, a=args, d=dynamic: export(m, a, d),
            },
            options.repeats,
        )
        ours, theirs = median(times["capture"]), median(times["export"])
        rows.append((name, f"{ours:.2f}", f"{theirs:.2f}", f"{ours / theirs:.2f}"))
    write_table(
        "capture_speed",
        "Capture against torch.export",
        "python -m benchmarks.capture_speed",
        ("model", "capture, CPU s", "torch.export, CPU s", "ratio"),
        rows,
        "Medians, interleaved in one process, one thread. Goal: ratio ≤ 0.6.",
    )


if __name__ == "__main__":
    main()
