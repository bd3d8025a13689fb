"""Which axes `prune.channels` selects, and why others stay whole."""

import pytest
import torch
from torch import nn

from fxcompress.errors import SelectorError
from passes.prune.channels import Channels
from tests.passes.prune.shrinking import INNER, resnet, sizes, transformer
from tests.passes.support import apply, captured, random_input


def test_kinds_select_axes():
    result = apply(Channels, transformer(), {"ratio": 0.5, "kinds": ["head", "neuron"]})
    assert {each.kind for each in result.decision.axes} == {"head", "neuron"}
    state = result.program.state()
    assert state["layers.0.qkv.weight"].shape == (48, 32)
    assert state["layers.0.up.weight"].shape == (64, 32)


def test_targets_are_modules_that_make_an_axis_not_those_that_read_it():
    result = apply(Channels, resnet(), {"ratio": 0.5, "targets": ["layer1.0.conv1"]})
    assert sizes(result) == {INNER: 4}
    assert apply(Channels, resnet(), {"ratio": 0.5, "targets": [INNER]}).decision.axes
    excluded = apply(Channels, resnet(), {"ratio": 0.5, "exclude": ["layer1*", "stem*"]})
    assert all(name.startswith("layer2") for name in sizes(excluded))


def test_what_cannot_shrink_is_declined_with_the_reason():
    reasons = apply(Channels, resnet(), {"ratio": 0.5}).reasons()
    assert reasons["head.weight[0]"].startswith("it is a size of the model's output")
    assert reasons["stem.0.weight[1]"].startswith("it is a size of the model's input")


def test_outputs_shrink_if_asked_for_and_are_named():
    options = {"ratio": 0.5, "targets": ["head"], "signature": "free"}
    result = apply(Channels, resnet(), options)
    assert result.program(random_input(3, 3, 16, 16)).shape == (3, 5)
    assert result.decision.outputs == ("output 0: size 1 10 → 5 (head.weight[0])",)


class Unknown(nn.Module):
    """A product whose op has no rule."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)
        self.third, self.fourth = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.second(torch.renorm(self.first(x), 2, 1, 1.0))
        return self.fourth(self.third(x))


def test_ops_without_a_rule_are_counted_and_keep_what_they_touch():
    result = apply(Channels, captured(Unknown, 2, 4), {"ratio": 0.5})
    assert result.decision.unknown == {"renorm": 1}
    assert sizes(result) == {"second.weight[0]": 2, "third.weight[0]": 4}
    assert result.reasons()["first.weight[0]"] == "renorm has no rule (/renorm)"
    assert result.decision.summary()[-1] == (
        "no rule for renorm (1 node): first.weight[0], second.weight[1] stay whole"
    )


def test_a_target_that_only_reads_says_who_makes_it():
    class Tail(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.tail = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.tail(self.wide(x))

    with pytest.raises(SelectorError, match="matches only axes that cannot shrink"):
        apply(Channels, captured(Tail, 2, 4), {"ratio": 0.5, "targets": ["tail"]})
