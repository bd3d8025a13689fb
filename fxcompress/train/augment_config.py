"""How training varies its images, as plain data that a spec can hold. Imports no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from fxcompress.train.loss_config import Part

__all__ = ["Augment", "Crop", "Jitter", "Mix", "RandAugment"]


class Crop(Part):
    """A random part of the image, scaled to the size of the whole."""

    scale: tuple[float, float] = Field(
        default=(0.08, 1.0), strict=False, description="Least and largest share of the area."
    )
    ratio: tuple[float, float] = Field(
        default=(0.75, 4 / 3), strict=False, description="Least and largest width over height."
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError("`scale` has two shares of the area, the smaller first")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError("`ratio` has two numbers above 0, the smaller first")
        return self


class Jitter(Part):
    """Random changes of colour: each by a factor from 1 − x to 1 + x, the hue by −x to x."""

    brightness: float = Field(default=0.0, ge=0, le=1)
    contrast: float = Field(default=0.0, ge=0, le=1)
    saturation: float = Field(default=0.0, ge=0, le=1)
    hue: float = Field(default=0.0, ge=0, le=0.5)


class RandAugment(Part):
    """Some of fourteen operations at one strength (Cubuk et al., 2020, arXiv:1909.13719)."""

    ops: int = Field(default=2, ge=1, description="Operations one after the other.")
    magnitude: int = Field(default=9, ge=0, le=30, description="Strength of each.")


class Mix(Part):
    """Each batch mixed with itself, images and labels: by MixUp or by CutMix.

    MixUp blends two images (Zhang et al., 2018, arXiv:1710.09412), CutMix pastes a rectangle of
    one into the other (Yun et al., 2019, arXiv:1905.04899); labels become shares of two classes.
    """

    classes: int = Field(ge=2, description="How many classes there are.")
    mixup: float = Field(default=0.2, gt=0, description="α of the Beta distribution of MixUp.")
    cutmix: float = Field(default=1.0, gt=0, description="α of the Beta distribution of CutMix.")
    share: tuple[float, float] = Field(
        default=(3.0, 1.0),
        strict=False,
        description="How often MixUp is taken, to how often CutMix is.",
    )

    @model_validator(mode="after")
    def _some(self) -> Self:
        if min(self.share) < 0 or not sum(self.share):
            raise ValueError("`share` has two numbers from 0, not both 0")
        return self


class Augment(Part):
    """What happens to each image of a training batch, in this order; `mix` to the whole batch."""

    crop: Crop | None = Field(default=None, description="A random part, scaled to the same size.")
    flip: tuple[Literal["horizontal", "vertical"], ...] = Field(
        default=(), strict=False, description="Flip every second image so, on average."
    )
    rotation: float = Field(
        default=0.0, ge=0, le=180, description="Turn by up to so many degrees either way."
    )
    randaugment: RandAugment | None = Field(
        default=None, description="Some operations out of a fixed set, drawn for each image."
    )
    jitter: Jitter | None = Field(default=None, description="Change brightness and colours.")
    mix: Mix | None = Field(default=None, description="Blend images and labels of a batch.")
    mean: tuple[float, ...] = Field(
        default=(),
        strict=False,
        description="What the source took from each channel: put back meanwhile, so that values "
        "go from 0 to 1.",
    )
    std: tuple[float, ...] = Field(
        default=(), strict=False, description="What the source divided each channel by."
    )

    @model_validator(mode="after")
    def _both(self) -> Self:
        if len(self.mean) != len(self.std):
            raise ValueError("`mean` and `std` have one number for each channel, both of them")
        return self
