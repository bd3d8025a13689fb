"""What `prune.unstructured` refuses, and what the errors name."""

import json

import pytest
import torch
from torch import nn

from fxcompress.errors import DataError, NumericsError, SelectorError, UsageError
from fxcompress.pipeline.context import Context
from passes.prune.unstructured import Unstructured
from tests.passes.models import image_batches
from tests.passes.prune.sparse import (
    CRITERIA,
    density,
    images,
    resnet,
)
from tests.passes.support import apply, captured, random_input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threshold": 100.0}, UsageError, r"every entry of stem\.0\.weight would become zero"),
        ({"threshold": 1e-12}, UsageError, "there is no weight to prune"),
        ({"ratio": 0.0001, "types": ["linear"]}, UsageError, "there is no weight to prune"),
        ({"ratio": 0.5, "targets": ["convs*"]}, SelectorError, "matches nothing"),
        ({"ratio": 0.5, "expect": 3}, SelectorError, "11 nodes are selected, 3 are expected"),
        ({"ratio": 0.5, "criterion": "wanda", "calibration": 99}, DataError, "holds 32 samples"),
    ],
)
def test_what_cannot_be_done_is_an_error(options, error, message):
    with pytest.raises(error, match=message):
        apply(Unstructured, resnet(), options, images())


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_criteria_of_data_need_data(criterion):
    with pytest.raises(DataError, match="there is no split calibration"):
        apply(Unstructured, resnet(), {"ratio": 0.5, "criterion": criterion})
    with pytest.raises(DataError):
        apply(Unstructured, resnet(), {"ratio": 0.5, "criterion": criterion},
              Context(data={"calibration": []}))  # fmt: skip


def test_pruning_as_much_again_finds_nothing_to_do():
    once = apply(Unstructured, resnet(), {"ratio": 0.5}).program
    with pytest.raises(UsageError) as caught:
        apply(Unstructured, once, {"ratio": 0.5})
    assert "stem.0: it is as sparse already" in caught.value.reason
    more = apply(Unstructured, once, {"ratio": 0.75}).program
    for name, tensor in once.state().items():
        if name.endswith("conv1.weight"):
            assert bool(((tensor != 0) | (more.state()[name] == 0)).all())
            assert density(more, name) == tensor.numel() // 4


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_name_the_weight(criterion, bad):
    def build():
        layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        with torch.no_grad():
            layers[1].weight[0, 0] = bad
        return layers

    program = captured(build, 2, 4)
    context = Context(data={"calibration": [(random_input(4, 4),)]})
    options = {"ratio": 0.5, "criterion": criterion, "calibration": 4}
    with pytest.raises(NumericsError) as caught:
        apply(Unstructured, program, options, context)
    assert caught.value.where == "1.weight"


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_bad_data_names_the_weight_it_reaches(criterion):
    batches = image_batches(4, 8)
    batches[1][0][0, 0, 0, 0] = float("nan")
    options = {"ratio": 0.5, "criterion": criterion, "calibration": 32}
    with pytest.raises(NumericsError, match=r"in the inputs that stem\.0\.weight"):
        apply(Unstructured, resnet(), options, Context(data={"calibration": batches}))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ratio": 0.5, "threshold": 0.1},
        {"ratio": 0.0},
        {"ratio": 1.0},
        {"ratio": "0.5"},
        {"threshold": -1.0},
        {"threshold": 0.1, "criterion": "wanda"},
        {"threshold": 0.1, "scope": "global"},
        {"ratio": 0.5, "criterion": "sparsegpt", "scope": "row"},
        {"ratio": 0.5, "criterion": "l1"},
        {"ratio": 0.5, "damping": 0.0},
        {"ratio": 0.5, "mask": True},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match="validation error"):
        Unstructured.Options.model_validate_json(json.dumps(options))
