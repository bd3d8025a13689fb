"""Overrides of `quantize.static`: other integers for some layers, and layers kept in float."""

import json

import pytest

from fxcompress.errors import SelectorError
from passes.quantize.static import Static
from tests.passes.models import ResNet
from tests.passes.quantize.quantised import Add, calibrated, quantised, quantizers
from tests.passes.support import apply, captured, random_input, sqnr, text_of


def overridden(build, *overrides, **options):
    return quantised(build, {"overrides": list(overrides), **options})


def test_weights_of_some_layers_have_other_integers():
    result = overridden(
        Add,
        {"types": ["conv2d"], "weights": {"bits": 4, "observer": "mse"}},
        {"targets": ["b"], "weights": {"bits": 6, "per": "tensor"}},
    )
    entries = {each.tensor: each for each in result.decision.weights}
    assert {name: each.bits for name, each in entries.items()} == {
        "a.weight": 4, "b.weight": 6, "head.weight": 8,
    }  # fmt: skip
    # What the later one leaves out is as the earlier one has it.
    assert [entries[name].observer for name in ("a.weight", "b.weight")] == ["mse", "mse"]
    assert entries["head.weight"].observer is None
    assert entries["b.weight"].axis is None
    fakes = quantizers(result)
    assert (fakes["a_weight_fq"].bits, fakes["a_weight_fq"].qmax) == (4, 7)
    assert fakes["b_weight_fq"].shape == ()
    assert "1 weights as 4-bit integers per channel" in result.decision.summary()
    assert "1 weights as 6-bit integers per tensor" in result.decision.summary()


def test_another_observer_finds_other_scales():
    plain = quantised(Add, {"weights": {"bits": 3}})
    result = overridden(
        Add, {"targets": ["a"], "weights": {"observer": "mse"}}, weights={"bits": 3}
    )
    scales = {name: (plain.decision.arrays[name], found) for name, found in
              result.decision.arrays.items()}  # fmt: skip
    assert bool((scales["a_weight_fq"][0] > scales["a_weight_fq"][1]).any())
    assert bool((scales["b_weight_fq"][0] == scales["b_weight_fq"][1]).all())


def test_activations_are_those_that_the_layers_read():
    result = overridden(
        Add, {"targets": ["head"], "activations": {"bits": 4, "observer": "minmax"}}
    )
    bits = {each.path: each.bits for each in result.decision.activations}
    assert bits == {"x_fq": 8, "a_fq": 8, "relu_fq": 8, "relu_2_fq": 4}
    entry = next(each for each in result.decision.activations if each.path == "relu_2_fq")
    assert (entry.low, entry.high) == (0.0, pytest.approx(entry.scale * 15, rel=1e-5))


def test_a_tensor_has_the_bits_of_the_reader_that_wants_most():
    both = overridden(Add, {"targets": ["a", "b"], "activations": {"bits": 4}})
    assert quantizers(both)["x_fq"].bits == 4
    one = overridden(Add, {"targets": ["a"], "activations": {"bits": 4}})
    assert quantizers(one)["x_fq"].bits == 8
    wider = overridden(Add, {"targets": ["a"], "activations": {"bits": 12}})
    assert quantizers(wider)["x_fq"].bits == 12


def test_kept_layers_and_adds_stay_in_float_unless_a_later_override_says_otherwise():
    result = overridden(Add, {"targets": ["b", "/add"], "keep": True})
    assert result.reasons()["b"] == "overrides[0] keeps it"
    assert result.reasons()["/add"] == "it is excluded"
    assert "/add = add(a_fq, /relu)" in text_of(result.program)
    assert [each.op for each in result.decision.in_float] == ["conv2d", "relu", "add"]
    back = overridden(Add, {"types": ["conv2d"], "keep": True}, {"targets": ["b"], "keep": False})
    assert "b_weight_fq" in quantizers(back)
    assert "a_weight_fq" not in quantizers(back)


def test_more_bits_for_the_worst_layers_are_closer():
    low = quantised(ResNet, {"weights": {"bits": 3}})
    mixed = overridden(
        ResNet, {"targets": ["stem.0", "head"], "weights": {"bits": 8}}, weights={"bits": 3}
    )
    x = random_input(16, 3, 16, 16)
    assert sqnr(mixed.before, mixed.program, x) > sqnr(low.before, low.program, x) + 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"targets": ["stem*"], "keep": True}, "`stem*` in `targets` matches nothing"),
        ({"types": ["conv3d"], "keep": True}, "`conv3d` in `types` matches nothing"),
        (
            {"targets": ["/add"], "weights": {"bits": 4}},
            "overrides[0] sets weights of what has none",
        ),
    ],
)
def test_an_override_for_nothing_is_an_error(override, message):
    program = captured(Add, 2, 3, 16, 16)
    options = {"calibration": 16, "overrides": [override]}
    with pytest.raises(SelectorError) as caught:
        apply(Static, program, options, calibrated())
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"keep": True}, "an override needs `targets` or `types`"),
        ({"targets": ["a"]}, "an override needs `weights`, `activations` or `keep`"),
        ({"targets": ["a"], "weights": {"bits": 1}}, "should be at least 2"),
        ({"targets": ["a"], "bits": 4}, "Extra inputs are not permitted"),
    ],
)
def test_an_override_that_says_nothing_is_refused(override, message):
    with pytest.raises(ValueError, match="validation error") as caught:
        Static.Options.model_validate_json(json.dumps({"overrides": [override]}))
    assert message in str(caught.value)
