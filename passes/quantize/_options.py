"""What a spec may say about static quantization, checked against what the target can do."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from fxcompress.pipeline.base import Options, Selection
from passes.quantize._bits import Width
from passes.quantize._targets import (
    TARGETS,
    Granularity,
    Numbers,
    PlacementRules,
    Target,
    for_floats,
)

__all__ = [
    "ActivationOptions",
    "ActivationOverride",
    "Numbers",
    "ObserverName",
    "Override",
    "StaticOptions",
    "WeightObserver",
    "WeightOptions",
    "WeightOverride",
]

ObserverName = Literal["minmax", "moving_average", "percentile", "mse", "entropy"]
WeightObserver = Literal["minmax", "mse"]


class WeightOptions(Options):
    """How weights are quantised."""

    bits: Width = Field(default=8, ge=2, le=16, description="Width of the integers.")
    per: Granularity = Field(
        default="channel", description="One scale per output channel, or one for the tensor."
    )
    observer: WeightObserver = Field(
        default="minmax", description="Cover every weight, or clip where that lowers the error."
    )


class ActivationOptions(Options):
    """How activations are quantised: always one scale per tensor."""

    bits: Width = Field(default=8, ge=2, le=16, description="Width of the integers.")
    signed: bool | None = Field(
        default=None, description="Signed integers; by default as the target has them."
    )
    symmetric: bool | None = Field(
        default=None,
        description="Zero point in the middle of the integers; by default as the target has it.",
    )
    observer: ObserverName = Field(
        default="mse",
        description="How the range is found from calibration data: all values (minmax), the "
        "average of the batches' extremes (moving_average), a share of the values (percentile), "
        "the least squared error (mse) or the least KL divergence (entropy).",
    )
    percentile: float = Field(
        default=99.99, gt=50, le=100, description="Per cent of the values in range (percentile)."
    )
    momentum: float = Field(
        default=0.1, gt=0, le=1, description="Weight of a new batch (moving_average)."
    )


class WeightOverride(Options):
    """Other weights; what is left out stays as it is."""

    bits: Width | None = Field(default=None, ge=2, le=16, description="Width of the integers.")
    per: Granularity | None = Field(
        default=None, description="One scale per output channel, or one for the tensor."
    )
    observer: WeightObserver | None = Field(
        default=None, description="Cover every weight, or clip where that lowers the error."
    )


class ActivationOverride(Options):
    """Other activations; what is left out stays as it is."""

    bits: Width | None = Field(default=None, ge=2, le=16, description="Width of the integers.")
    observer: ObserverName | None = Field(
        default=None, description="How the range is found from calibration data."
    )
    percentile: float | None = Field(
        default=None, gt=50, le=100, description="Per cent of the values in range (percentile)."
    )
    momentum: float | None = Field(
        default=None, gt=0, le=1, description="Weight of a new batch (moving_average)."
    )


class Override(Options):
    """Other integers for some layers and for what they read, or none."""

    targets: tuple[str, ...] = Field(
        default=(), description="Globs over node ids; empty means every candidate."
    )
    types: tuple[str, ...] = Field(
        default=(), description="Op names (`conv2d`) or module classes (`Conv2d`)."
    )
    weights: WeightOverride | None = Field(default=None, description="How weights are quantised.")
    activations: ActivationOverride | None = Field(
        default=None, description="How the activations that they read are quantised."
    )
    keep: bool | None = Field(default=None, description="Leave them in float.")

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not (self.targets or self.types):
            raise ValueError("an override needs `targets` or `types`: without, it is for all")
        if self.weights is None and self.activations is None and self.keep is None:
            raise ValueError("an override needs `weights`, `activations` or `keep`")
        return self


class StaticOptions(Selection):
    """Options of `quantize.static`. The selection is over convolutions and linear layers."""

    target: Target = Field(
        default="generic",
        description="The runtime whose integer kernels quantizers are placed for.",
    )
    dtype: Numbers = Field(
        default="int",
        description="What weights and activations become: integers of their `bits`, or 8-bit "
        "floats.",
    )
    weights: WeightOptions = Field(
        default=WeightOptions(), description="How weights are quantised."
    )
    activations: ActivationOptions = Field(
        default=ActivationOptions(), description="How activations are quantised."
    )
    overrides: tuple[Override, ...] = Field(
        default=(), description="Other integers for some layers; of two that match the later wins."
    )
    calibration: int = Field(default=128, ge=1, description="Samples of the calibration split.")
    keep_first: bool = Field(
        default=False, description="Leave the layers that read the inputs in float."
    )
    keep_last: bool = Field(
        default=False, description="Leave the layers that make the outputs in float."
    )
    keep: tuple[str, ...] = Field(
        default=(), description="Globs over adds, concatenations and pools to leave in float."
    )
    products: bool = Field(
        default=False, description="Also quantise the operands of matmul and bmm (attention)."
    )

    @property
    def rules(self) -> PlacementRules:
        """What the target's kernels take."""
        rules = TARGETS[self.target]
        return for_floats(rules) if self.floats else rules

    @property
    def floats(self) -> bool:
        """Whether weights and activations are 8-bit floats."""
        return self.dtype != "int"

    @property
    def signed(self) -> bool:
        """Whether activations are signed, where they are not told by the target."""
        return self.floats or bool(
            self.rules.signed if self.activations.signed is None else self.activations.signed
        )

    @property
    def symmetric(self) -> bool:
        """Whether activations are symmetric, where they are not told by the target."""
        told = self.activations.symmetric
        return self.floats or bool(self.rules.symmetric if told is None else told)

    @model_validator(mode="after")
    def _the_target_can(self) -> Self:
        problems = [*self._float_problems(), *self._widths(), *self._kinds()]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _float_problems(self) -> list[str]:
        """Return what does not go with 8-bit floats."""
        if not self.floats:
            return []
        rules, found = self.rules, []
        if self.dtype not in rules.dtypes:
            able = [row.name for row in TARGETS.values() if self.dtype in row.dtypes]
            found.append(
                f"{rules.name}'s kernels take {' or '.join(rules.dtypes)}, not {self.dtype}: "
                f"that is for target {' or '.join(able)}"
            )
        activations = [self.activations, *(each.activations for each in self.overrides)]
        weights = [self.weights, *(each.weights for each in self.overrides)]
        if any(each and each.observer == "entropy" for each in activations):
            found.append("the observer `entropy` counts integers: 8-bit floats take another")
        if False in (self.activations.signed, self.activations.symmetric):
            found.append("8-bit floats are signed and symmetric")
        if any(each and each.bits not in (None, 8) for each in [*weights, *activations]):
            found.append("8-bit floats have 8 bits: drop `bits`")
        return found

    def _widths(self) -> list[str]:
        """Return which widths and granularities the target has no kernels for."""
        rules, found = self.rules, []
        weights: list[WeightOptions | WeightOverride] = [self.weights]
        weights += [each.weights for each in self.overrides if each.weights]
        acts: list[ActivationOptions | ActivationOverride] = [self.activations]
        acts += [each.activations for each in self.overrides if each.activations]
        for what, allowed, asked in (
            ("weights", rules.weight_bits, [each.bits for each in weights]),
            ("activations", rules.activation_bits, [each.bits for each in acts]),
        ):
            for bits in sorted({each for each in asked if each and each not in allowed}):
                can = " or ".join(map(str, allowed))
                fewer = what == "weights" and bits < min(allowed)
                found.append(
                    f"{rules.name}'s integer kernels take {what} of {can} bits, not of {bits}"
                    + (": quantize.weight_only stores fewer" if fewer else "")
                )
        for per in sorted({each.per for each in weights if each.per} - set(rules.weight_per)):
            can = " or ".join(rules.weight_per)
            found.append(
                f"{rules.name}'s integer kernels take weights with a scale per {can}, not per {per}"
            )
        return found

    def _kinds(self) -> list[str]:
        rules, found = self.rules, []
        for name, yes, no in (
            ("signed", "signed", "unsigned"),
            ("symmetric", "symmetric", "affine"),
        ):
            told, fixed = getattr(self.activations, name), getattr(rules, name)
            if None not in (told, fixed) and told != fixed:
                can, asked = (yes, no) if fixed else (no, yes)
                found.append(f"{rules.name} takes {can} activations, not {asked} ones")
        if self.products and not rules.products:
            found.append(
                f"{rules.name} has no integer products of two activations: drop `products`"
            )
        return found
