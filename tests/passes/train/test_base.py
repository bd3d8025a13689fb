"""A pass that trains is a few lines on `TrainingPass`: what trains, and what happens in a step."""

from typing import ClassVar

import pytest
import torch
from torch import nn

from fxcompress.errors import PassError, SelectorError
from fxcompress.ir import capture
from fxcompress.pipeline import Context
from fxcompress.train import Hooks
from passes.train._base import TrainingPass
from passes.train._options import TrainDecision, TrainOptions
from passes.train._train import train
from tests.passes.support import apply, seeded


class Biases(TrainingPass[TrainOptions, TrainDecision]):
    """Train biases alone, drawn to 5."""

    Options: ClassVar = TrainOptions
    Decision: ClassVar = TrainDecision

    def decide(self, program, options, context):
        names = [name for name in program.state() if name.endswith("bias")]

        def drawn(module, moment):
            biases = (p for name, p in module.named_parameters() if name in names)
            return sum((bias - 5).square().sum() for bias in biases)

        return train(program, options, context, names=names, hooks=lambda _: Hooks(penalty=drawn))


class All(Biases):
    def decide(self, program, options, context):
        return train(program, options, context)


def small():
    layers = seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
    return capture(layers, (torch.zeros(2, 4),))


def data():
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    return Context(data={"train": [((x,), x[:, :3].argmax(1))] * 4})


OPTIONS = {"steps": 200, "optimizer": {"use": "SGD", "lr": 0.1}}


def test_only_the_named_parameters_change_and_the_hook_is_called():
    result = apply(Biases, small(), OPTIONS, data())
    assert result.decision.parameters == ("0.bias", "2.bias")
    before, after = result.before.state(), result.program.state()
    for name in ("0.weight", "2.weight"):
        assert torch.equal(after[name], before[name])
    torch.testing.assert_close(after["0.bias"], torch.full((8,), 5.0), atol=0.5, rtol=0)
    assert "penalty" in result.decision.history[-1].losses


def test_without_names_everything_trains():
    result = apply(All, small(), OPTIONS | {"steps": 1}, data())
    assert result.decision.parameters == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert set(result.decision.arrays) == set(result.decision.parameters)


def test_a_plan_and_the_data_are_spoken_for():
    assert Biases().reads(TrainOptions(steps=1, split="tune")) == {"tune"}
    planned = apply(Biases, small(), OPTIONS, Context(planning=True)).decision
    assert planned.pending == (
        "2 tensors (11 parameters): known after training (200 steps on train)",
    )


def test_a_change_beyond_what_was_selected_is_caught():
    program = small()
    result = apply(All, program, OPTIONS | {"steps": 1}, data())
    claimed = result.decision.model_copy(update={"parameters": ("0.bias",)})
    with pytest.raises(PassError, match="which was not selected"):
        All().ensures(program, result.program, claimed)


def test_a_model_without_parameters_has_nothing_to_train():
    program = capture(nn.ReLU(), (torch.zeros(2, 4),))
    with pytest.raises(SelectorError, match="nothing is selected"):
        apply(All, program, OPTIONS, data())
