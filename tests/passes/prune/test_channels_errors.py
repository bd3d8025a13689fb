"""What `prune.channels` refuses, and what the errors say."""

import json
import re

import pytest
import torch

from fxcompress.errors import DataError, NumericsError, SelectorError, UsageError
from fxcompress.ir import capture
from passes.prune.channels import Channels
from tests.passes.models import ResNet
from tests.passes.prune.shrinking import resnet
from tests.passes.support import apply, random_input, seeded


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ratio": 1.0, "max_ratio": 1.0}, UsageError, "a ratio of 1 empties stem.0.weight[0]"),
        ({"ratio": 0.6}, UsageError, "max_ratio 0.5 leaves at least 4"),
        ({"keep": 2}, UsageError, "max_ratio 0.5 leaves at least 4"),
        ({"budget": {"macs": "5%"}}, UsageError, "the smallest reachable is 97,360 (29.2%"),
        ({"ratio": 0.5, "round_to": 64}, UsageError, "larger than stem.0.weight[0], which has 8"),
        ({"ratio": 0.5, "targets": ["head"]}, SelectorError, "it is a size of the model's output"),
        ({"ratio": 0.5, "targets": ["head"]}, SelectorError, "`signature: free`"),
        ({"ratio": 0.5, "targets": ["stem.0.weight[1]"]}, SelectorError, "the model's input (x)"),
        ({"ratio": 0.5, "targets": ["stem.0.weight[1]"], "signature": "free"}, SelectorError,
         "of the model's input"),
        ({"ratio": 0.5, "targets": ["layer9.*"]}, SelectorError, "`layer9.*` in `targets` matches"),
        ({"ratio": 0.5, "targets": ["layer1"]}, SelectorError, "write `layer1.*`"),
        ({"ratio": 0.5, "exclude": ["fc"]}, SelectorError, "`fc` in `exclude` matches no axis"),
        ({"ratio": {"layer9.*": 0.5}}, SelectorError, "`layer9.*` in `ratio` matches no axis"),
        ({"ratio": 0.5, "kinds": ["channel", "head"]}, SelectorError, "`head` in `kinds` matches"),
        ({"ratio": 0.5, "kinds": ["head"]}, SelectorError, "there are: `channel`, `residual`"),
        ({"ratio": 0.5, "kinds": ["neuron"]}, SelectorError, "head.weight[0]: it is a size of the"),
        ({"ratio": 0.5, "kinds": ["residual"], "targets": ["layer1.0.conv1"]}, SelectorError,
         "the targets are of the kinds `channel`"),
        ({"ratio": 0.5, "expect": 4}, SelectorError, "6 axes are selected, 4 are expected"),
        ({"ratio": 0.5, "criterion": {"name": "taylor"}}, DataError, "needs a split calibration"),
        ({"ratio": 0.5, "compensation": {"method": "bias"}}, DataError, "needs a split calib"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_an_error_that_says_why(options, error, message):
    with pytest.raises(error, match=re.escape(message)) as caught:
        apply_told(options)
    assert caught.value.what


def apply_told(options):
    try:
        apply(Channels, resnet(), options)
    except (UsageError, SelectorError, DataError) as error:
        # What matters may be in the reason or in the hint.
        raised = type(error)(str(error))
        raise raised from error


def test_a_nan_weight_is_named():
    model = seeded(ResNet)
    with torch.no_grad():
        model.layer1[0].conv1.weight[2, 0, 0, 0] = float("nan")
    program = capture(model, (random_input(2, 3, 16, 16),))
    with pytest.raises(NumericsError, match=r"layer1\.0\.conv1\.weight"):
        apply(Channels, program, {"ratio": 0.5})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ratio": 0.5, "keep": 4},
        {"ratio": "150%"},
        {"keep": 0},
        {"budget": {}},
        {"budget": {"latency": "80%", "macs": "50%"}},
        {"budget": {"flops": "50%"}},
        {"keep": 4, "scope": "global"},
        {"ratio": {"layer1.*": 0.5}, "scope": "global"},
        {"ratio": 0.5, "round_to": 0},
        {"ratio": 0.5, "kinds": ["channels"]},
        {"ratio": 0.5, "min_keep": 0},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match="validation error"):
        Channels.Options.model_validate_json(json.dumps(options))
