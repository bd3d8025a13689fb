"""Amounts, limits, and the pure check of figures against them."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from fxcompress.spec.constraints import Constraints, Figures, check_constraints
from fxcompress.spec.units import Amount, Count, Drop, Duration, Percent, Size


@pytest.mark.parametrize(
    ("kind", "text", "value", "relative"),
    [
        (Size, "20MiB", 20 * 2**20, False),
        (Size, "1.5 kB", 1500, False),
        (Size, "25%", 0.25, True),
        (Count, "2.5G", 2.5e9, False),
        (Count, 1000, 1000, False),
        (Count, "175k", 175e3, False),
        (Duration, "12ms", 0.012, False),
        (Drop, "0.3pt", 0.003, False),
        (Drop, 0.01, 0.01, False),
        (Drop, "1.0%", 0.01, True),
    ],
)
def test_amounts(kind: object, text: object, value: float, relative: bool) -> None:
    amount: Amount = TypeAdapter(kind).validate_json(json.dumps(text))
    assert amount.value == pytest.approx(value)
    assert amount.relative == relative
    assert TypeAdapter(kind).dump_python(amount) == str(text)
    assert TypeAdapter(kind).validate_python(amount) == amount


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Size, 25), (Size, "25"), (Size, "20 MIB"), (Size, "-1MiB"), (Size, True), (Size, None),
        (Size, "1e999MiB"), (Count, "3MiB"), (Duration, "12"), (Drop, "1 point"), (Percent, 50),
        (Percent, "150%"), (Percent, "x"), (Percent, -0.1), (Percent, True), (Size, [1]),
    ],
)  # fmt: skip
def test_amounts_refuse(kind: object, text: object) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(kind).validate_json(json.dumps(text))


ORIGINAL = {"metric": 0.9, "size": 4000.0, "macs": 1e6, "latency": 0.02, "nodes": 10.0}


@pytest.mark.parametrize(
    ("constraint", "result", "higher", "met"),
    [
        ({"metric_drop": "1%"}, {"metric": 0.892}, True, True),
        ({"metric_drop": "1%"}, {"metric": 0.890}, True, False),
        ({"metric_drop": "1pt"}, {"metric": 0.8901}, True, True),
        ({"metric_drop": "1%"}, {"metric": 0.95}, False, False),
        ({"metric_drop": "1%"}, {"metric": 0.5}, False, True),
        ({"metric": {"min": 0.5}}, {"metric": 0.5}, True, True),
        ({"metric": {"max": 0.4}}, {"metric": 0.5}, True, False),
        ({"size": "25%"}, {"size": 1000}, True, True),
        ({"size": "25%"}, {"size": 1001}, True, False),
        ({"size": "1kB"}, {"size": 1001}, True, False),
        ({"macs": "50%"}, {"macs": 4e5}, True, True),
        ({"latency": "15ms"}, {"latency": 0.016}, True, False),
        ({"output_error": 0.05}, {"output_error": 0.04}, True, True),
        ({"cosine": 0.99}, {"cosine": 0.98}, True, False),
        ({"sqnr": 20.0}, {"sqnr": 21.0}, True, True),
        ({"nodes": "100%"}, {"nodes": 11}, True, False),
        ({"parameters": "50%"}, {"parameters": 5}, True, None),
        ({"activation_peak": "1MiB"}, {}, True, None),
        ({"size": "25%"}, {"size": float("nan")}, True, False),
    ],
)
def test_limits(
    constraint: dict[str, object], result: dict[str, float], higher: bool, met: bool | None
) -> None:
    limits = Constraints.model_validate_json(json.dumps(constraint))
    (found,) = check_constraints(limits, Figures(ORIGINAL, result, higher))
    assert found.met is met
    assert {True: ": met", False: "NOT met", None: "not measured"}[met] in str(found)


def test_results_come_in_the_order_of_the_fields() -> None:
    limits = Constraints.model_validate_json(
        json.dumps({"size": "25%", "metric": {"min": 0.1, "max": 0.2}, "metric_drop": "1%"})
    )
    found = check_constraints(limits, Figures())
    assert [r.name for r in found] == ["metric_drop", "metric.min", "metric.max", "size"]
    assert check_constraints(Constraints(), Figures()) == []


@given(st.floats(0.001, 1e12), st.floats(0, 100))
@settings(deadline=None)
def test_a_share_of_the_original_is_met_by_exactly_that_share(size: float, percent: float) -> None:
    limits = Constraints.model_validate_json(json.dumps({"size": f"{percent}%"}))
    exactly = size * (percent / 100)
    (met,) = check_constraints(limits, Figures({"size": size}, {"size": exactly}))
    (above,) = check_constraints(limits, Figures({"size": size}, {"size": exactly * 1.01 + 1e-9}))
    assert met.met
    assert not above.met


@pytest.mark.parametrize(
    ("limit", "reached"), [("1pt", "-0.2pt"), ("1%", "-0.208% (-0.002)"), (0.01, "-0.002")]
)
def test_what_was_reached_is_told_in_the_unit_of_the_limit(limit: object, reached: str) -> None:
    constraints = Constraints.model_validate({"metric_drop": limit})
    figures = Figures({"metric": 0.96}, {"metric": 0.962})
    (result,) = check_constraints(constraints, figures)
    assert result.reached == reached
