"""Vary the images of training batches, with the transforms of torchvision.

Everything is drawn from torch's default generator, which the feed sets for each batch: the same
seed gives the same images, whatever the model draws and wherever a training is resumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxcompress._imports import imported
from fxcompress._torchvision import declare_operators
from fxcompress.errors import DataError
from fxcompress.train.augment_config import Augment

__all__ = ["Augmentation"]


class Augmentation:
    """Changes `(batch, target)` as a config says.

    Args:
        config: What happens.

    Raises:
        MissingExtraError: torchvision is not installed.
    """

    def __init__(self, config: Augment) -> None:
        self.config = config
        self.v2 = _transforms()

    def __call__(self, batch: Any, target: Any) -> tuple[Any, Any]:
        """Return a changed batch; with `mix` the targets are shares `[n, classes]`.

        Raises:
            DataError: There are no images in the batch, or no classes to mix.
        """
        named = batch if isinstance(batch, Mapping) else dict(enumerate(batch))
        place = next((key for key, value in named.items() if _is_images(value)), None)
        if place is None:
            shown = ", ".join(str(tuple(getattr(v, "shape", ()))) for v in named.values())
            raise DataError(
                "there are no images to augment",
                reason=f"a batch has {shown}; images are [n, channels, height, width] floats",
                hint="leave `augment` out",
            )
        images = self._varied(named[place])
        if self.config.mix is not None:
            images, target = self._mixed(images, target)
        changed = {**named, place: images}
        return (changed if isinstance(batch, Mapping) else tuple(changed.values())), target

    def _varied(self, images: Tensor) -> Tensor:
        """Vary each image on its own."""
        steps = self._steps(images)
        if not steps:
            return images
        mean, std = (torch.tensor(each).view(-1, 1, 1) for each in self._normal(images))
        pixels = (images * std + mean).clamp(0, 1)
        found = []
        for each in pixels:
            for step in steps:
                each = step(each)
            found.append(each)
        return (torch.stack(found) - mean) / std

    def _normal(self, images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
        config, channels = self.config, images.shape[1]
        if not config.mean:
            return (0.0,) * channels, (1.0,) * channels
        if len(config.mean) != channels:
            raise DataError(
                f"images have {channels} channels, and `augment.mean` has {len(config.mean)}",
                hint="give one number for each channel",
            )
        return config.mean, config.std

    def _steps(self, images: Tensor) -> list[Any]:
        config, v2 = self.config, self.v2
        smooth = v2.InterpolationMode.BILINEAR
        steps: list[Any] = []
        if config.crop is not None:
            size = list(images.shape[-2:])
            steps.append(v2.RandomResizedCrop(size, config.crop.scale, config.crop.ratio))
        if "horizontal" in config.flip:
            steps.append(v2.RandomHorizontalFlip())
        if "vertical" in config.flip:
            steps.append(v2.RandomVerticalFlip())
        if config.rotation:
            steps.append(v2.RandomRotation(config.rotation, smooth))
        if config.randaugment is not None:
            told = config.randaugment
            steps.append(v2.RandAugment(told.ops, told.magnitude, interpolation=smooth))
        if config.jitter is not None:
            steps.append(v2.ColorJitter(**config.jitter.model_dump()))
        return steps

    def _mixed(self, images: Tensor, target: Any) -> tuple[Tensor, Tensor]:
        mix = self.config.mix
        assert mix is not None, "asked for by the caller"
        fits = isinstance(target, Tensor) and target.shape == images.shape[:1]
        if not fits or target.is_floating_point():
            raise DataError(
                "the targets cannot be mixed",
                reason="they should be one class for each image",
                hint="leave `augment.mix` out",
            )
        if int(target.min()) < 0 or int(target.max()) >= mix.classes:
            raise DataError(
                f"a target is none of the {mix.classes} classes of `augment.mix`",
                reason=f"targets go from {int(target.min())} to {int(target.max())}",
            )
        first = mix.share[0] / sum(mix.share)
        blends = bool(torch.rand(()) < first)
        kind, alpha = (self.v2.MixUp, mix.mixup) if blends else (self.v2.CutMix, mix.cutmix)
        mixed: tuple[Tensor, Tensor] = kind(alpha=alpha, num_classes=mix.classes)(images, target)
        return mixed


def _is_images(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point()


def _transforms() -> Any:
    declare_operators()
    return imported(
        "torchvision.transforms.v2",
        needs="`augment` needs its transforms",
        hint="pip install torchvision, in the build that fits your torch",
    )
