"""What a spec says about the importance of channels: the criterion and its settings."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from fxcompress.axes.roles import Role
from fxcompress.pipeline.base import Options
from fxcompress.spec._factories import Factory

__all__ = ["Criterion", "CriterionName", "Named", "Normalise", "Reduction"]

CriterionName: TypeAlias = Literal[
    "l1", "l2", "bn_scale", "fpgm", "lamp", "taylor", "fisher", "obd", "activation_norm", "apoz",
    "wanda", "random",
]  # fmt: skip
Reduction: TypeAlias = Literal["auto", "sum", "mean", "max", "first"]
Normalise: TypeAlias = Literal["auto", "none", "mean", "max", "sum"]

_WITH_DATA: Final = frozenset({"taylor", "fisher", "obd", "activation_norm", "apoz", "wanda"})
_IN_UNITS_OF_LOSS: Final = frozenset({"fisher", "obd"})
_PER_AXIS_MEAN: Final = frozenset({"l1", "l2", "fpgm", "activation_norm", "wanda"})
_OVER_PLACES_MEAN: Final = frozenset({"bn_scale", "activation_norm", "apoz"})
_ROLES: Final[dict[str, tuple[Role, ...]]] = {
    "l1": ("out", "in", "scale", "other"),
    "l2": ("out", "in", "scale", "other"),
    "lamp": ("out", "in", "scale", "other"),
    "bn_scale": ("scale",),
    "fpgm": ("out",),
    "taylor": ("in",),
    "fisher": ("in",),
    "obd": ("in",),
    "wanda": ("in",),
}


class Criterion(Options):
    """How important each index of an axis is.

    Every place where an axis occurs in the parameters is scored, and `reduction` makes one score
    of them. `roles` are the places that count; where an axis has none of these, all of its places
    do.
    """

    name: CriterionName = Field(default="l2", description="How importance is measured.")
    reduction: Reduction = Field(
        default="auto",
        description="One score from all places of an axis; `first` takes the first alone; `auto` "
        "is `mean` for bn_scale, activation_norm and apoz, else `sum`.",
    )
    normalise: Normalise = Field(
        default="auto",
        description="What an axis's scores are divided by before a budget compares those of all "
        "axes; with `auto` it compares shares of each axis, except for fisher and obd, which are "
        "compared as they are.",
    )
    roles: tuple[Role, ...] = Field(
        default=(), description="Places that count; empty means those the criterion is made for."
    )
    data: str = Field(default="calibration", description="Split that statistics come from.")
    samples: int = Field(default=128, ge=1, description="Samples that are read of it.")
    factory: Factory | None = Field(
        default=None,
        description="Your own criterion: `fn(program, analysis, axes, context, **args)` returns "
        "scores `[axis.size]` by axis name.",
    )
    args: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of the factory."
    )

    @model_validator(mode="after")
    def _one_source(self) -> Criterion:
        if self.factory is not None and "name" in self.model_fields_set:
            raise ValueError("give the `name` of a criterion or a `factory`, not both")
        if self.args and self.factory is None:
            raise ValueError("`args` are those of a `factory`")
        return self

    @property
    def label(self) -> str:
        """What texts call it."""
        return self.factory or self.name

    @property
    def needs_data(self) -> bool:
        """Whether calibration data is read."""
        return self.factory is None and self.name in _WITH_DATA

    @property
    def joined(self) -> Literal["sum", "mean", "max", "first"]:
        """How the scores of the places become one."""
        if self.reduction != "auto":
            return self.reduction
        return "mean" if self.name in _OVER_PLACES_MEAN else "sum"

    @property
    def counted(self) -> tuple[Role, ...]:
        """The roles of the places that count."""
        return self.roles or _ROLES.get(self.name, ())

    @property
    def relative(self) -> bool:
        """Whether a budget compares scores only within an axis, and axes by their shares.

        Measured, that beats scores as they are for all criteria but `fisher` and `obd`, whose
        scores add up to a loss. Whoever sets `normalise`, or writes a criterion, has scores in
        one unit.
        """
        given = self.factory is not None or self.normalise != "auto"
        return not given and self.name not in _IN_UNITS_OF_LOSS

    @property
    def divisor(self) -> Literal["none", "mean", "max", "sum"]:
        """What an axis's scores are divided by."""
        if self.normalise != "auto":
            return self.normalise
        return "mean" if self.factory is None and self.name in _PER_AXIS_MEAN else "none"


def _by_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Named: TypeAlias = Annotated[
    Criterion, BeforeValidator(_by_name, json_schema_input_type=CriterionName | Criterion)
]
"""A criterion with its settings, or its name alone (`criterion: taylor`)."""
