"""The same trainings by torchdistill: its configuration, its box, its loop."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.train._images import Batch, Case
from fxcompress._torchvision import declare_operators

__all__ = ["CONFIG", "criterion", "train"]

CONFIG = Path(__file__).parent / "configs" / "kd_torchdistill.yaml"


def criterion(losses: Sequence[tuple[str, dict[str, Any], dict[str, Any] | None, float]]) -> Any:
    """Return a weighted sum of (loss, its options, how its tensors are found, weight)."""
    terms = {
        f"term{index}": {"criterion": {"key": key, "kwargs": options}, "weight": weight}
        | ({"criterion_wrapper": {"key": "SimpleLossWrapper", "kwargs": read}} if read else {})
        for index, (key, options, read, weight) in enumerate(losses)
    }
    return {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}}


def train(
    case: Case,
    batches: Sequence[Batch],
    student: nn.Module,
    teacher: nn.Module,
    losses: Any,
    taps: Sequence[str] = (),
) -> None:
    """Train the student with the shipped configuration; `losses` replaces its criterion.

    `taps` are modules whose outputs are hooked. Batches keep their order and size.
    """
    declare_operators()
    from torchdistill.common.yaml_util import load_yaml_file
    from torchdistill.core.distillation import get_distillation_box

    logging.getLogger().setLevel(logging.WARNING)
    config = load_yaml_file(str(CONFIG))["train"]
    config["criterion"] = config["criterion"] if losses is None else losses
    config["optimizer"]["kwargs"]["lr"] = case.rate
    config["scheduler"]["kwargs"]["T_max"] = len(batches)
    config["train_data_loader"]["kwargs"]["batch_size"] = len(batches[0][1])
    config.pop("val_data_loader")
    for side in ("teacher", "student"):
        config[side] = {**config[side], "forward_hook": {"output": list(taps)}} if taps else (
            config[side]
        )  # fmt: skip
    images = torch.cat([x[0] for x, _ in batches])
    datasets = {"train": TensorDataset(images, torch.cat([y for _, y in batches]))}
    teacher.eval()
    box = get_distillation_box(
        teacher, student, datasets, config, torch.device("cpu"), None, False, 1.0
    )
    for epoch in range(box.num_epochs):
        box.pre_epoch_process(epoch=epoch)
        for sample, target, extra in box.train_data_loader:
            box.pre_forward_process()
            loss: Tensor = box.forward_process(sample, target, extra)
            box.post_forward_process(loss)
        box.post_epoch_process()
    box.clean_modules()


def reads(module: str | None, side: str = "student") -> Mapping[str, Any]:
    """Say where a plain loss of torch finds its tensors: labels, or a module of the teacher."""
    wanted: dict[str, Any] = {"uses_label": True}
    if module is not None:
        wanted = {"is_from_teacher": True, "module_path": module, "io": "output"}
    path = "." if module is None else module
    return {
        "input": {"is_from_teacher": side == "teacher", "module_path": path, "io": "output"},
        "target": wanted,
    }
