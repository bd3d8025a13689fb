"""FloatQuantize: against the numbers of the formats, at its edges, and described."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.errors import UsageError
from fxcompress.ir.modules import describe
from fxcompress.nn import FloatQuantize

BITS = {"e4m3": (4, 3, 7), "e5m2": (5, 2, 15)}


def numbers(format):
    """Every finite number of a format, from its definition."""
    exponent, mantissa, bias = BITS[format]
    found = set()
    for code in range(2 ** (exponent + mantissa)):
        e, m = code >> mantissa, code & (2**mantissa - 1)
        if e == 0:
            value = m / 2**mantissa * 2.0 ** (1 - bias)
        else:
            value = (1 + m / 2**mantissa) * 2.0 ** (e - bias)
        # e4m3 has no infinity, one NaN; e5m2 keeps the last exponent for both.
        last = e == 2**exponent - 1
        if last and (format == "e5m2" or m == 2**mantissa - 1):
            continue
        found |= {value, -value}
    return torch.tensor(sorted(found), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(
    format=st.sampled_from(["e4m3", "e5m2"]),
    scale=st.sampled_from([1.0, 0.25, 3e-3, 17.0]),
    spread=st.sampled_from([1e-3, 1.0, 300.0, 1e6]),
    seed=st.integers(0, 99),
)
def test_every_number_becomes_the_nearest_of_the_format(format, scale, spread, seed):
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed)) * spread
    module = FloatQuantize(format)
    module.scale.fill_(scale)
    grid = numbers(format) * float(module.scale)
    error = (module(x).double() - x.double()).abs()
    nearest = (x.double()[:, None] - grid).abs().amin(1)
    # The result is a float32.
    assert ((error - nearest).abs() <= 2e-7 * x.abs() + 1e-9 * scale).all()


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_channels_are_fitted_alone_and_zeros_stay_zeros(format):
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    weight[1], weight[2] = 0, weight[2] * 1e4
    module = FloatQuantize(format, axis=0, shape=(4,)).fit(weight.abs().amax(1))
    y = module(weight)
    assert not y[1].any()
    assert module.scale[1] == 1
    largest = weight.abs().argmax(1)
    torch.testing.assert_close(y.gather(1, largest[:, None]), weight.gather(1, largest[:, None]))
    limit = 2.0 ** -(BITS[format][1] + 1)
    assert (
        (y - weight).abs() <= limit * weight.abs() + module.scale[:, None] * module.smallest
    ).all()
    assert torch.equal(module(y), y)
    assert module.quantize(weight).dtype == module.dtype


def test_what_is_out_of_range_saturates_and_gets_no_gradient():
    module = FloatQuantize("e4m3")
    x = torch.tensor([-1e6, -448.0, 1.3, 500.0], requires_grad=True)
    y = module(x)
    assert y.tolist() == [-448, -448, 1.25, 448]
    y.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]


def test_half_precision_is_rounded_once():
    x = torch.randn(99, generator=torch.Generator().manual_seed(0)).half()
    module = FloatQuantize()
    module.scale.fill_(0.013)
    assert torch.equal(module(x), module(x.float()).half())


def test_it_is_described_and_refuses_what_there_is_not():
    module = FloatQuantize("e5m2", axis=1, shape=(3,))
    assert describe(module).nondefault() == {"format": "e5m2", "axis": 1, "shape": (3,)}
    with pytest.raises(UsageError, match="no 8-bit float"):
        FloatQuantize("e3m4")
    with pytest.raises(UsageError, match="does not fit"):
        FloatQuantize(axis=0)
