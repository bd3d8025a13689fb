"""What the training loop costs above a bare loop in PyTorch: the same model, batches and steps.

python -m benchmarks.train.overhead [--repeats 15]

Both train the same weights with AdamW on the same batches in the same order, sum up the loss of
each step, and end in the same bits; loops are taken in turns, and CPU time counts.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks._common import interleaved, median, write_table
from fxcompress._torchvision import declare_operators
from fxcompress.train import FitConfig, fit

GOAL = 1.05
RATE = 1e-3

Batches = Sequence[tuple[tuple[Tensor, ...] | Mapping[str, Tensor], Tensor]]


@dataclass(frozen=True)
class Case:
    """A model and what it is trained on."""

    name: str
    model: nn.Module
    batches: Batches


def cases() -> list[Case]:
    """Return what is measured, from the smallest step to the largest."""
    declare_operators()
    import torchvision
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=2000, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=512, num_labels=10, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    tokens = [
        ({"input_ids": torch.randint(0, 2000, (16, 64))}, torch.randint(0, 10, (16,)))
        for _ in range(8)
    ]
    return [
        Case(
            "convolutions of 16 channels, 64 images of 8 pixels",
            nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
                nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
                nn.Flatten(), nn.Linear(1024, 10),
            ),
            images(150, (64, 1, 8, 8)),
        ),
        Case(
            "ResNet-18, 8 images of 64 pixels",
            torchvision.models.resnet18(num_classes=10),
            images(6, (8, 3, 64, 64)),
        ),
        Case(
            "BERT of 4 layers, width 128, 16 texts of 64 tokens",
            transformers.BertForSequenceClassification(config),
            tokens,
        ),
    ]  # fmt: skip


def images(count: int, shape: tuple[int, ...]) -> Batches:
    return [((torch.randn(shape),), torch.randint(0, 10, shape[:1])) for _ in range(count)]


def bare(case: Case) -> Callable[[], nn.Module]:
    """Return a loop as one writes it by hand."""

    def train() -> nn.Module:
        model = copy.deepcopy(case.model).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
        total = 0.0
        for batch, target in case.batches:
            output = model(**batch) if isinstance(batch, Mapping) else model(*batch)
            logits = output if isinstance(output, Tensor) else output.logits
            loss = F.cross_entropy(logits, target, reduction="sum") / len(target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(target)
        return model

    return train


def ours(case: Case) -> Callable[[], nn.Module]:
    """Return the same by `fit`."""
    config = FitConfig.model_validate(
        {"epochs": 1, "shuffle": "none", "optimizer": {"use": "AdamW", "lr": RATE}}
    )

    def train() -> nn.Module:
        model = copy.deepcopy(case.model)
        fit(model, config, case.batches)
        return model

    return train


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether all weights are alike, bit for bit."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def measure(case: Case, repeats: int) -> tuple[list[object], float]:
    """Return a row of the table, and the ratio."""
    loops = {"bare": bare(case), "fit": ours(case)}
    equal = same(loops["bare"](), loops["fit"]())
    times = interleaved(loops, repeats)
    steps = len(case.batches)
    # Neighbours share what else the machine does: the median of their ratios counts.
    ratio = median([b / a for a, b in zip(times["bare"], times["fit"], strict=True)])
    each = {name: 1000 * median(values) / steps for name, values in times.items()}
    row = [
        case.name,
        f"{each['bare']:.2f}",
        f"{each['fit']:.2f}",
        f"{100 * (ratio - 1):+.1f} %",
        "yes" if equal else "no",
    ]
    return row, ratio


def main() -> int:
    """Measure every case and write the table; 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    found = [measure(case, repeats) for case in cases()]
    worst = max(ratio for _, ratio in found)
    write_table(
        "train_overhead",
        "The training loop against a bare loop",
        f"python -m benchmarks.train.overhead --repeats {repeats}",
        ["model", "bare, ms per step", "fit, ms per step", "more", "same bits"],
        [row for row, _ in found],
        f"CPU time on one thread, median of {repeats} epochs taken in turns. "
        f"Goal: at most 5 % more; the worst here is {100 * (worst - 1):+.1f} %.",
    )
    return 0 if worst <= GOAL and all(row[-1] == "yes" for row, _ in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
