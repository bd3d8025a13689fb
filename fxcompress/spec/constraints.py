"""What a result must reach: limits in the spec, and the pure check against measured figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fxcompress.pipeline.base import Options
from fxcompress.spec.units import Amount, Count, Drop, Duration, Size

__all__ = ["ConstraintResult", "Constraints", "Figures", "MetricLimit", "check_constraints"]


class MetricLimit(Options):
    """Absolute limits of the metric."""

    min: float | None = Field(
        default=None, allow_inf_nan=False, description="The metric must be at least this."
    )
    max: float | None = Field(
        default=None, allow_inf_nan=False, description="The metric must be at most this."
    )

    @model_validator(mode="after")
    def _ordered(self) -> MetricLimit:
        if self.min is None and self.max is None:
            raise ValueError("needs `min` or `max`")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError("`min` is above `max`")
        return self


class Constraints(Options):
    """Limits of the result; a percentage is a share of the original's figure.

    `metric_drop` is how much worse the metric may get. All others are upper limits, but `cosine`,
    `sqnr` and `metric.min`.
    """

    metric_drop: Drop | None = Field(
        default=None, description="How much worse the metric may get: `1%` of its value, `0.3pt`."
    )
    metric: MetricLimit | None = Field(default=None, description="Absolute limits of the metric.")
    size: Size | None = Field(default=None, description="Bytes of the tensors as stored.")
    parameters: Count | None = Field(default=None, description="Number of parameters.")
    macs: Count | None = Field(default=None, description="Multiply-accumulates of one sample.")
    nodes: Count | None = Field(default=None, description="Nodes of the graph.")
    activation_peak: Size | None = Field(default=None, description="Most bytes alive at once.")
    latency: Duration | None = Field(default=None, description="Median time of one call.")
    output_error: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        allow_inf_nan=False,
        description="Largest error of the outputs, relative to their range.",
    )
    cosine: Annotated[float, Field(ge=-1, le=1)] | None = Field(
        default=None, description="Least cosine similarity of the outputs to the original's."
    )
    sqnr: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="Least signal-to-noise ratio of the outputs, in dB.",
    )


@dataclass(frozen=True)
class Figures:
    """Measured figures of the original and of the result, by the names of Constraints.

    Sizes are in bytes, latency in seconds; `output_error`, `cosine` and `sqnr` compare the two and
    stand in `result`. A name that is absent was not measured.
    """

    original: Mapping[str, float] = field(default_factory=dict)
    result: Mapping[str, float] = field(default_factory=dict)
    higher_is_better: bool = True


@dataclass(frozen=True)
class ConstraintResult:
    """One limit and what was reached; `met` is None where nothing was measured."""

    name: str
    limit: str
    relation: Literal["<=", ">="]
    bound: float | None
    value: float | None
    met: bool | None

    @property
    def reached(self) -> str:
        """What was reached, in the unit of the limit: a percentage is a share of the original's."""
        if self.value is None:
            return "not measured"
        if self.limit.endswith("%") and self.bound:
            return f"{self.value / self.bound * float(self.limit[:-1]):.3g}% ({self.value:.6g})"
        if self.limit.endswith("pt"):
            return f"{100 * self.value:.3g}pt"
        return f"{self.value:.6g}"

    def __str__(self) -> str:
        verdict = {True: "met", False: "NOT met", None: "not measured"}[self.met]
        reached = "" if self.value is None else f", is {self.value:.6g}"
        bound = "" if self.bound is None else f" ({self.bound:.6g})"
        return f"{self.name} {self.relation} {self.limit}{bound}{reached}: {verdict}"


_UPPER = ("size", "parameters", "macs", "nodes", "activation_peak", "latency", "output_error")
_LOWER = ("cosine", "sqnr")


def check_constraints(constraints: Constraints, figures: Figures) -> list[ConstraintResult]:
    """Return one result per limit of the spec, in the order of the model's fields.

    A NaN figure meets nothing.
    """
    results: list[ConstraintResult] = []
    for name in type(constraints).model_fields:
        limit = getattr(constraints, name)
        if limit is not None:
            results.extend(_CHECKS[name](name, limit, figures))
    return results


def _drop(name: str, limit: Amount, figures: Figures) -> list[ConstraintResult]:
    original, value = figures.original.get("metric"), figures.result.get("metric")
    bound = None if original is None else limit.of(abs(original))
    if original is None or value is None:
        return [ConstraintResult(name, str(limit), "<=", bound, None, None)]
    drop = original - value if figures.higher_is_better else value - original
    return [_compared(name, str(limit), "<=", bound, drop)]


def _metric(name: str, limit: MetricLimit, figures: Figures) -> list[ConstraintResult]:
    value = figures.result.get("metric")
    results = []
    if limit.min is not None:
        results.append(_compared(f"{name}.min", f"{limit.min:g}", ">=", limit.min, value))
    if limit.max is not None:
        results.append(_compared(f"{name}.max", f"{limit.max:g}", "<=", limit.max, value))
    return results


def _upper(name: str, limit: Amount | float, figures: Figures) -> list[ConstraintResult]:
    value, original = figures.result.get(name), figures.original.get(name)
    if not isinstance(limit, Amount):
        return [_compared(name, f"{limit:g}", "<=", limit, value)]
    bound = limit.of(original or 0.0) if original is not None or not limit.relative else None
    return [_compared(name, str(limit), "<=", bound, value)]


def _lower(name: str, limit: float, figures: Figures) -> list[ConstraintResult]:
    return [_compared(name, f"{limit:g}", ">=", limit, figures.result.get(name))]


def _compared(
    name: str, limit: str, relation: Literal["<=", ">="], bound: float | None, value: float | None
) -> ConstraintResult:
    met: bool | None = None
    if bound is not None and value is not None:
        # A limit of 25% of 4,000 must not fail on the last bit of 0.25 * 4000.
        slack = 1e-9 * abs(bound)
        met = value <= bound + slack if relation == "<=" else value >= bound - slack
    return ConstraintResult(name, limit, relation, bound, value, met)


_CHECKS: Mapping[str, Callable[..., list[ConstraintResult]]] = {
    "metric_drop": _drop,
    "metric": _metric,
    **dict.fromkeys(_UPPER, _upper),
    **dict.fromkeys(_LOWER, _lower),
}
