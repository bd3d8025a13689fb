import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.errors import NumericsError
from fxcompress.nn import FakeQuantize
from passes.quantize._histogram import Histogram
from passes.quantize._observers import (
    HistogramObserver,
    MinMax,
    MovingAverage,
    Percentile,
    make_observer,
)
from passes.quantize._search import mse_weight_range

VALUES = st.lists(st.floats(-1e4, 1e4, width=32, allow_subnormal=False), min_size=1, max_size=60)
KINDS = ("minmax", "moving_average", "percentile", "mse", "entropy")
U8 = {"signed": False, "symmetric": False}


def tensors(values, cuts):
    """Cut a list into tensors at arbitrary places."""
    x = torch.tensor(values)
    edges = sorted({min(cut, len(values)) for cut in cuts} | {0, len(values)})
    return [x[a:b] for a, b in pairwise(edges) if b > a]


def filled(batches, bins=64):
    histogram = Histogram(bins)
    for x in batches:
        histogram.update(x, float(x.min()), float(x.max()))
    return histogram


def heavy_tailed(seed=0, size=20000):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator) ** 3


def error(x, fake, low, high):
    fake.fit(torch.tensor(low), torch.tensor(high))
    return float((fake(x) - x).square().mean())


@settings(max_examples=150, deadline=None)
@given(VALUES, st.lists(st.integers(0, 60), max_size=4))
def test_a_histogram_counts_everything_however_it_is_batched(values, cuts):
    whole, parts = filled([torch.tensor(values)]), filled(tensors(values, cuts))
    assert whole.zeros == parts.zeros == values.count(0.0)
    assert int(whole.counts.sum()) + whole.zeros == len(values)
    assert whole.width == parts.width
    assert whole.first == parts.first
    assert torch.equal(whole.counts, parts.counts)
    assert len(whole.counts) <= whole.bins


@settings(max_examples=100, deadline=None)
@given(VALUES)
def test_bins_hold_what_they_say(values):
    histogram = filled([torch.tensor(values)])
    for number, count in enumerate(histogram.counts.tolist(), start=histogram.first):
        low, high = number * histogram.width, (number + 1) * histogram.width
        assert count == sum(low <= v < high and v != 0 for v in values)


def test_a_large_tensor_is_sampled_and_its_range_is_not():
    x = torch.zeros(1000)
    x[1], x[2] = -7.0, 9.0
    histogram = Histogram(bins=64, sample=100)
    histogram.update(x, -7.0, 9.0)
    assert (histogram.low, histogram.high) == (-7.0, 9.0)
    assert 80 <= int(histogram.counts.sum()) + histogram.zeros <= 120


@pytest.mark.parametrize("shape", [(8, 300, 7, 7), (4, 64, 14, 14), (3, 50, 15, 21)])
def test_a_sample_sees_every_row_and_column_alike(shape):
    x = torch.full(shape, 1.0)
    x[..., 0] = 3.0
    histogram = Histogram(bins=64, sample=x.numel() // shape[-1])
    histogram.update(x, 1.0, 3.0)
    border = int(histogram.counts[histogram.centres > 2.5].sum())
    assert border / int(histogram.counts.sum()) == pytest.approx(1 / shape[-1], rel=0.05)


@settings(max_examples=60, deadline=None)
@given(VALUES, st.lists(st.integers(0, 60), max_size=4))
def test_min_max_covers_everything(values, cuts):
    observer = MinMax("x")
    for x in tensors(values, cuts):
        observer.update(x)
    low, high = observer.range(FakeQuantize())
    assert low == min(torch.tensor(values).tolist())
    assert high == max(torch.tensor(values).tolist())


@settings(max_examples=60, deadline=None)
@given(VALUES, st.sampled_from(KINDS))
def test_ranges_stay_within_what_was_seen(values, kind):
    observer = make_observer(kind, "x", percentile=99.0)
    x = torch.tensor(values)
    observer.update(x)
    low, high = observer.range(FakeQuantize(**U8))
    assert min(0.0, float(x.min())) <= low <= high <= max(0.0, float(x.max()))


def test_moving_average_follows_the_batches():
    observer = MovingAverage("x", momentum=0.5)
    for high in (1.0, 3.0, 5.0):
        observer.update(torch.tensor([-high, high]))
    assert observer.range(FakeQuantize()) == (-3.5, 3.5)


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_percentiles_are_those_of_the_values(percentile):
    x = heavy_tailed()
    observer = Percentile("x", percentile)
    for part in x.split(3000):
        observer.update(part)
    low, high = observer.range(FakeQuantize())
    tail, width = (100 - percentile) / 200, observer.histogram.width
    share = lambda where: float(where.double().mean())  # noqa: E731
    assert share(x < low) - 1e-9 <= tail <= share(x < low + width) + 1e-9
    assert share(x > high) - 1e-9 <= tail <= share(x > high - width) + 1e-9


@pytest.mark.parametrize("kind", [U8, {"symmetric": True}], ids=["affine", "symmetric"])
@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("relu", [False, True])
def test_the_mse_range_beats_min_max_and_every_even_shrinking(kind, bits, relu):
    x = heavy_tailed()
    x = x.relu() if relu else x
    observer = HistogramObserver("x")
    observer.update(x)
    fake = FakeQuantize(bits, **kind)
    found = error(x, fake, *observer.range(fake))
    low, high = float(x.min()), float(x.max())
    assert found < error(x, fake, low, high)
    best = min(error(x, fake, low * k / 100, high * k / 100) for k in range(1, 101))
    assert found <= best * 1.05


def test_an_even_distribution_is_not_clipped():
    x = torch.linspace(0, 1, 10000)
    for search in ("mse", "entropy"):
        observer = HistogramObserver("x", search)
        observer.update(x)
        _, high = observer.range(FakeQuantize(**U8))
        assert high > 0.97


def test_entropy_clips_a_far_outlier():
    x = torch.cat([torch.randn(100000, generator=torch.Generator().manual_seed(0)),
                   torch.tensor([200.0])])  # fmt: skip
    observer = HistogramObserver("x", "entropy")
    observer.update(x)
    _, high = observer.range(FakeQuantize(**U8))
    assert high < 100


def test_zeros_of_a_relu_do_not_pull_the_range_down():
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    sparse = torch.cat([x, torch.zeros(100000)])
    ranges = []
    for values in (x, sparse):
        observer = HistogramObserver("x")
        observer.update(values)
        ranges.append(observer.range(FakeQuantize(**U8)))
    assert ranges[0] == ranges[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 3.0, -2.5])
def test_a_constant_has_a_range_that_holds_it(kind, value):
    observer = make_observer(kind, "x", percentile=99.9)
    observer.update(torch.full((50,), value))
    observer.update(torch.full((20,), value))
    assert observer.constant == value
    fake = FakeQuantize(**U8)
    low, high = observer.range(fake)
    fake.fit(torch.tensor(low), torch.tensor(high))
    assert float(fake(torch.tensor(value))) == pytest.approx(value, rel=1e-2)


@pytest.mark.parametrize(
    ("bad", "what"), [(math.nan, "a NaN"), (math.inf, "an infinity"), (-math.inf, "an infinity")]
)
def test_nan_and_infinity_are_named_with_their_batch(bad, what):
    observer = MinMax("layer1.0/relu")
    observer.update(torch.ones(3))
    with pytest.raises(NumericsError, match=f"{what} in the output of layer1.0/relu") as caught:
        observer.update(torch.tensor([1.0, bad]))
    assert "batch 2" in caught.value.reason


def test_weight_ranges_per_row_have_the_least_error_of_their_shrinkings():
    rows = heavy_tailed(size=4 * 500).reshape(4, 500)
    fake = FakeQuantize(4, narrow=True)
    low, high = mse_weight_range(rows, fake)
    for row, a, b in zip(rows, low.tolist(), high.tolist(), strict=True):
        found = error(row, fake, a, b)
        full = float(row.min()), float(row.max())
        tried = [error(row, fake, full[0] * k / 64, full[1] * k / 64) for k in range(33, 65)]
        assert found <= min(tried) * (1 + 1e-5)
        assert found < tried[-1]
