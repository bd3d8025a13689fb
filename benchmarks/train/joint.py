"""What a joint step costs against the same step in plain PyTorch, models run one after the other.

python -m benchmarks.train.joint [--repeats 15]

Apart: the teacher's forward without gradients, the student's forward, hooks that catch features,
the same losses and projectors, one backward. Joint: one call of the joint program, one backward.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks._common import interleaved, median, write_table
from fxcompress._torchvision import declare_operators
from fxcompress.api import compress
from fxcompress.ir import Program, capture
from fxcompress.train.config import FitConfig
from fxcompress.train.joint import join
from fxcompress.train.losses import make_terms

GOAL = 1.1
LOSSES = [{"use": "hard_labels"}, {"use": "soft_labels", "temperature": 4.0}, {"use": "features"}]


@dataclass(frozen=True)
class Case:
    """A pair of models, a batch, and the layers whose outputs are compared."""

    name: str
    student: nn.Module
    teacher: nn.Module
    batch: Mapping[str, Tensor]
    layers: Sequence[tuple[str, str]]
    dynamic: Mapping[str, Mapping[int, str]]


def cases() -> list[Case]:
    """Return the models that are measured."""
    declare_operators()
    import torchvision
    import transformers

    images = {"x": torch.randn(8, 3, 96, 96)}
    vision = Case(
        "ResNet-18 from ResNet-34, 8 images of 96 pixels",
        torchvision.models.resnet18(num_classes=10),
        torchvision.models.resnet34(num_classes=10),
        images,
        [(f"layer{i}", f"layer{i}") for i in (2, 3, 4)],
        {"x": {0: "batch"}},
    )

    def bert(layers: int, width: int) -> nn.Module:
        config = transformers.BertConfig(
            vocab_size=2000, hidden_size=width, num_hidden_layers=layers,
            num_attention_heads=width // 32, intermediate_size=4 * width, num_labels=10,
        )  # fmt: skip
        return transformers.BertForSequenceClassification(config)

    tokens = {
        "input_ids": torch.randint(0, 2000, (8, 64)),
        "attention_mask": torch.ones(8, 64, dtype=torch.long),
    }
    text = Case(
        "BERT of 4 layers, width 256, from 8 layers, width 384; 8 texts of 64 tokens",
        bert(4, 256),
        bert(8, 384),
        tokens,
        [(f"bert.encoder.layer.{i}", f"bert.encoder.layer.{2 * i + 1}") for i in range(4)],
        {name: {0: "batch", 1: "seq"} for name in tokens},
    )
    return [vision, text]


def logits_of(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output["logits"]
    return found


def apart(case: Case, projectors: Sequence[nn.Module], target: Tensor) -> Callable[[], None]:
    """Return a step in plain PyTorch."""
    kept: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    for side, model in (("student", case.student), ("teacher", case.teacher)):
        for place in case.layers:
            path = place[0] if side == "student" else place[1]

            def keep(_: Any, __: Any, output: Any, side: str = side) -> None:
                kept[side].append(output[0] if isinstance(output, tuple) else output)

            model.get_submodule(path).register_forward_hook(keep)
    case.teacher.eval()
    trained = [*case.student.parameters(), *(p for m in projectors for p in m.parameters())]

    def step() -> None:
        case.student.train()
        for values in kept.values():
            values.clear()
        with torch.no_grad():
            known = logits_of(_called(case.teacher, case.batch))
        logits = logits_of(_called(case.student, case.batch))
        loss = F.cross_entropy(logits, target)
        soft = F.kl_div(
            F.log_softmax(logits / 4, -1), F.log_softmax(known / 4, -1),
            log_target=True, reduction="batchmean",
        )  # fmt: skip
        loss = loss + 16 * soft
        pairs = zip(projectors, kept["student"], kept["teacher"], strict=True)
        distances = [F.mse_loss(project(ours), theirs) for project, ours, theirs in pairs]
        loss = loss + torch.stack(distances).mean()
        loss.backward()
        _clear(trained)

    return step


def joint(case: Case, student: Program, teacher: Program, target: Tensor) -> Callable[[], None]:
    """Return a step of the joint program."""
    config = FitConfig.model_validate({"steps": 1, "losses": LOSSES})
    program = join(student, teacher, make_terms(config.terms))
    student.module.train()
    trained = [p for p in program.module.parameters() if p.requires_grad]

    def step() -> None:
        totals = program(case.batch, target, 0.0).totals
        loss = torch.stack([total / count for total, count in totals.values()]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        _clear(trained)

    return step


def _called(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    return model(**batch)


def _clear(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def measure(case: Case, repeats: int) -> tuple[float, float]:
    """Return median CPU seconds of a step apart and joined."""
    target = torch.arange(8) % 10
    student, teacher = (
        capture(model.eval(), (), dict(case.batch), dynamic=case.dynamic, verify=False)
        for model in (case.student, case.teacher)
    )
    taps = [
        {"name": f"layer_{i}", "at": at, "teacher": other}
        for i, (at, other) in enumerate(case.layers)
    ]
    step = {"use": "distill.tap", "teacher": "given", "taps": taps}
    tapped = compress(student, [step], teacher=teacher).program
    config = FitConfig.model_validate({"steps": 1, "losses": LOSSES})
    made = join(tapped, teacher, make_terms(config.terms)).projectors
    projectors = [made.get(f"projectors.{tap['name']}", nn.Identity()) for tap in taps]
    calls = {
        "apart": apart(case, projectors, target),
        "joint": joint(case, tapped, teacher, target),
    }
    times = interleaved(calls, repeats, warmup=2)
    return median(times["apart"]), median(times["joint"])


def main() -> None:
    """Measure, and write `results/train_joint.md`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = []
    for case in cases():
        one, other = measure(case, options.repeats)
        row = (case.name, f"{1000 * one:.0f}", f"{1000 * other:.0f}", f"{other / one:.3f} ×")
        print(*row, flush=True)
        rows.append(row)
    write_table(
        "train_joint",
        "A joint step against teacher and student apart",
        "python -m benchmarks.train.joint",
        ("models", "apart, ms of CPU", "joint, ms of CPU", "joint over apart"),
        rows,
        f"Goal: ≤ {GOAL} ×. Cross entropy, soft labels and distances of layers through projectors, "
        "forward and backward, medians of interleaved steps on one thread. Apart is plain PyTorch: "
        "the teacher under `no_grad`, features by hooks.",
    )


if __name__ == "__main__":
    main()
