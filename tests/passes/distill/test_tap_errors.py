"""Taps that cannot be placed are one clear error."""

import pytest
import torch
from torch import nn

from fxcompress.errors import SelectorError, UsageError
from fxcompress.ir import capture
from fxcompress.pipeline.context import Context
from passes.distill.tap import Tap
from tests.passes.distill.taps import of_depth, resnet, tapped
from tests.passes.support import apply


def fails(error, program, *entries, original=None, match):
    options = (
        {"taps": list(entries)}
        if "at" in entries[0] and "name" in entries[0]
        else {"layers": list(entries)}
    )
    with pytest.raises(error, match=match):
        apply(Tap, program, options, Context(original=original))


def test_a_place_that_is_not_there_is_named():
    fails(SelectorError, resnet(), {"name": "x", "at": "layer9"}, match="no module and no node")
    fails(SelectorError, resnet(), {"name": "x", "at": "layer1.0.relu"}, match="2 times")
    fails(
        SelectorError,
        resnet(),
        {"name": "x", "at": "layer1", "what": "attention"},
        match="no attention",
    )
    fails(
        SelectorError, of_depth(4), {"name": "x", "at": "layers.*"}, match="no module and no node"
    )


def test_a_module_with_two_outputs_is_not_one_place():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Split()

        def forward(self, x):
            a, b = self.inner(x)
            return a * b

    class Split(nn.Module):
        def forward(self, x):
            return x + 1, x * 2

    program = capture(Two(), (torch.randn(2, 3),))
    fails(SelectorError, program, {"name": "x", "at": "inner"}, match="makes 2 values")


def test_counterparts_are_looked_up():
    student, teacher = of_depth(3), of_depth(2)
    fails(
        SelectorError,
        student,
        {"name": "x", "at": "layers.2"},
        original=teacher,
        match="in the teacher",
    )
    fails(
        UsageError,
        student,
        {"at": "layers.*"},
        original=teacher,
        match="3 layers cannot learn from 2",
    )
    fails(
        UsageError,
        student,
        {"at": "layers.*", "map": [[0, 7]]},
        original=teacher,
        match="no layer 7",
    )
    fails(SelectorError, student, {"at": "blocks.*"}, original=teacher, match="matches no module")


def test_two_taps_are_two():
    fails(
        UsageError, resnet(), {"name": "a", "at": "layer1"}, {"name": "b", "at": "layer1.1"},
        match="read one value",
    )  # fmt: skip
    once = tapped(resnet(), ("a", "layer1")).program
    fails(UsageError, once, {"name": "a", "at": "layer2"}, match="two taps are called a")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "say what to tap"),
        ({"taps": [{"name": "a", "at": "x"}, {"name": "a", "at": "y"}]}, "two taps are called a"),
        ({"layers": {"at": "x", "map": [[0, 1], [1, 1]]}}, "not one-to-one: teacher layer 1"),
        ({"layers": {"at": "x", "map": []}}, "lists no pairs"),
        ({"taps": [{"name": "a b", "at": "x"}]}, "pattern"),
        ({"taps": [{"name": "a", "at": "x"}], "teacher": {"spec": "a", "run": "b"}}, "either"),
    ],
    ids=str,
)
def test_options_are_checked(options, match):
    with pytest.raises(ValueError, match=match):
        Tap.Options.model_validate(options)
