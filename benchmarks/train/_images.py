"""The image models that trainings are compared on: a shipped teacher, and a student of one seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.quantize.dynamic import SPECS, load
from benchmarks.train.configs import data

__all__ = ["CASES", "Batch", "Case", "accuracy"]

Batch = tuple[tuple[Tensor, ...], Tensor]


@dataclass(frozen=True)
class Case:
    """A task.

    Attributes:
        folder: The example with model and weights.
        built: The teacher's factory in its model.py.
        student: Factory and arguments of the student.
        step: The options of `distill.student` that make the same one.
        layers: Module paths of the stages, alike in both.
        splits: Makes `train`, all batches of a training in order, and `eval`, for a seed.
        shape: Of a batch of two images.
        rate: Learning rate of students.
        attention: Weight of a layer's maps in attention transfer: half of the β of Zagoruyko and
            Komodakis, 1000, whose mean is over places; the maps of digits have a sixteenth of the
            places that CIFAR's have.
    """

    folder: str
    built: str
    student: tuple[str, Mapping[str, Any]]
    step: Mapping[str, Any]
    layers: tuple[str, ...]
    splits: Callable[..., Mapping[str, Sequence[Batch]]]
    shape: tuple[int, ...]
    rate: float
    attention: float

    @property
    def weights(self) -> str:
        """The file of the teacher's weights."""
        return str(SPECS / self.folder / f"{self.built}.safetensors")

    def teacher(self) -> nn.Module:
        """Build the shipped model."""
        model: nn.Module = getattr(_model(self.folder), self.built)()
        model.load_state_dict(load_file(self.weights))
        return model.eval()

    def begun(self, seed: int) -> nn.Module:
        """Build the student as `distill.student` does for this seed."""
        torch.manual_seed(seed)
        name, options = self.student
        model: nn.Module = getattr(_model(self.folder), name)(**options)
        if "layers" in self.step:  # the blocks that it has are the teacher's
            known = self.teacher().state_dict()
            model.load_state_dict({key: known[key] for key in model.state_dict()})
        return model


CASES: Mapping[str, Case] = {
    "digits": Case(
        "digits", "resnet8", ("resnet8", {"width": 8}),
        {"model": {"factory": "../../../specs/digits/model.py:resnet8", "args": {"width": 8}}},
        ("block1", "block2", "block3"),
        data.digits, (2, 1, 8, 8), 0.05, 500 / 16,
    ),
    "fashion": Case(
        "fashion_mnist", "resnet14", ("ResNet", {"blocks": 1, "classes": 10}),
        {"layers": [0, 2, 4]},
        ("layer1", "layer2", "layer3"), data.fashion, (2, 1, 28, 28), 0.02, 500,
    ),
}  # fmt: skip


@cache
def _model(folder: str) -> Any:
    return load(f"{folder}/model")


@torch.no_grad()
def accuracy(model: Callable[..., Tensor], batches: Sequence[Batch]) -> float:
    """Return the per cent of right classes."""
    if isinstance(model, nn.Module):
        model.eval()
    right = sum(int((model(*x).argmax(1) == y).sum()) for x, y in batches)
    return 100 * right / sum(len(y) for _, y in batches)
