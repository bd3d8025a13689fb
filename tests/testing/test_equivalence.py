import pytest
import torch
from torch import nn

from fxcompress.testing import assert_equivalent, golden_text
from tests.ir.small_models import SmallCnn, small_cnn, small_transformer


def test_equal_programs_and_modules():
    assert_equivalent(small_cnn(), small_cnn(), tolerance=0)
    assert_equivalent(small_transformer(), small_transformer(), tolerance=0)
    model = SmallCnn().eval()
    assert_equivalent(model, model, (torch.ones(1, 3, 16, 16),), tolerance=0)
    assert_equivalent(model, model, {"x": torch.ones(1, 3, 16, 16)}, tolerance=0)


def scaled(factor):
    program = small_cnn()
    other = program.copy()
    other.module.fc.weight = nn.Parameter(program.module.fc.weight * factor)
    return program, other


def test_tolerance_is_relative_to_absmax():
    program, other = scaled(1 + 1e-3)
    assert_equivalent(program, other, tolerance=1e-2)
    with pytest.raises(AssertionError, match=r"output 0: max \|Δ\| .* more than 1e-05"):
        assert_equivalent(program, other)


@pytest.mark.parametrize(
    ("reference", "candidate", "problem"),
    [
        (lambda x: x, lambda x: (x, x), "1 outputs, then 2"),
        (lambda x: x, lambda x: x.double(), "float32.*float64"),
        (lambda x: x, lambda x: x[:1], r"\[2\], then"),
        (lambda x: x.long(), lambda x: x.long() + 1, "2 of 2 values differ"),
        (lambda x: x, lambda x: x * float("nan"), "NaN in other places"),
        (lambda x: x * 0, lambda x: x, "is inf of absmax"),
        (lambda x: (x, None), lambda x: (x, 3), "None, then 3"),
        (lambda x: x / 0, lambda x: -x / 0, r"max \|Δ\| inf"),
    ],
)
def test_differences_are_named(reference, candidate, problem):
    with pytest.raises(AssertionError, match=problem):
        assert_equivalent(reference, candidate, (torch.ones(2),))


def test_nan_and_infinity_agree_with_themselves():
    def function(x):
        return torch.stack([x / 0, x * float("nan"), x])

    assert_equivalent(function, function, (torch.ones(2),))


def test_sizes_are_named():
    program = small_cnn()
    with pytest.raises(AssertionError, match="at batch=5"):
        assert_equivalent(program, scaled(2)[1], dims={"batch": 5})
    with pytest.raises(AssertionError, match="inputs are needed"):
        assert_equivalent(SmallCnn(), SmallCnn())


def test_golden_text_runs_in_eval_mode_and_changes_nothing():
    program = small_cnn()
    before = program.fingerprint()
    text = golden_text(program)
    program.module.train()
    assert golden_text(program) == text
    assert program.module.training
    assert all(module.training for module in program.module.modules())
    assert program.fingerprint() == before
    assert "outputs:" not in golden_text(program, outputs=False)
    assert "f32[7,10]" in golden_text(program, dims={"batch": 7})
