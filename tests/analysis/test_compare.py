import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxcompress.analysis import compare


def test_equal_outputs_have_no_error():
    y = torch.randn(3, 4)
    result = compare(y, y.clone())
    assert result.max_abs == 0
    assert result.relative == 0
    assert result.cosine == pytest.approx(1)
    assert result.sqnr_db == math.inf


def test_known_difference():
    y, z = torch.tensor([0.0, 3.0, 4.0]), torch.tensor([0.0, 3.0, 4.5])
    result = compare(y, z)
    assert result.max_abs == pytest.approx(0.5)
    assert result.relative == pytest.approx(0.125)
    assert result.cosine == pytest.approx((9 + 18) / (5 * math.hypot(3, 4.5)))
    assert result.sqnr_db == pytest.approx(10 * math.log10(25 / 0.25))


def test_relative_error_is_the_worst_output_s():
    small, large = torch.tensor([0.0, 1e-3]), torch.tensor([0.0, 1e3])
    result = compare({"a": small, "b": large}, {"a": small + 5e-4, "b": large})
    assert result.relative == pytest.approx(0.5, rel=1e-4)
    assert set(result.outputs) == {"['a']", "['b']"}
    assert result.outputs["['b']"].max_abs == 0


def test_nan_is_seen_and_equal_infinities_are_no_difference():
    y = torch.tensor([1.0, math.inf])
    assert compare(y, y.clone()).max_abs == 0
    assert not compare(torch.ones(2), torch.tensor([1.0, math.nan])).finite
    assert math.isnan(compare(torch.ones(2), torch.tensor([1.0, math.nan])).sqnr_db)


def test_other_structures_and_shapes_are_refused():
    with pytest.raises(ValueError, match="structure"):
        compare((torch.ones(1),), (torch.ones(1), torch.ones(1)))
    with pytest.raises(ValueError, match="shape"):
        compare(torch.ones(1, 2), torch.ones(2, 1))
    with pytest.raises(ValueError, match="differs"):
        compare((torch.ones(1), 3), (torch.ones(1), 4))


@given(st.floats(1e-3, 1e3), st.integers(1, 50), st.integers(0, 2**16))
def test_scaling_both_sides_changes_only_the_absolute_error(scale: float, size: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(size + 1, generator=generator, dtype=torch.float64)
    z = y + 0.01 * torch.randn(size + 1, generator=generator, dtype=torch.float64)
    one, other = compare(y, z), compare(y * scale, z * scale)
    assert other.max_abs == pytest.approx(one.max_abs * scale)
    assert other.relative == pytest.approx(one.relative)
    assert other.cosine == pytest.approx(one.cosine)
    assert other.sqnr_db == pytest.approx(one.sqnr_db)
