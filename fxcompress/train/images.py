"""A split of image files in folders, one folder for each class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from fxcompress.errors import DataError
from fxcompress.train._extras import needed
from fxcompress.train._rows import Rows
from fxcompress.train.data import Split
from fxcompress.train.inputs import InputSpec

__all__ = ["Fit", "from_images"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
Fit: TypeAlias = Literal["crop", "stretch"]
"""Scale the shorter side and cut the middle out, or scale both sides on their own."""


@dataclass(frozen=True)
class _Images(Rows):
    """Images read when they are asked for: `[n, channels, height, width]`, float32."""

    files: tuple[Path, ...]
    labels: Tensor | None
    size: tuple[int, int]
    fit: Fit
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch: int

    @property
    def samples(self) -> int:  # type: ignore[override]
        """How many files there are."""
        return len(self.files)

    def rows(self, start: int, end: int) -> Any:
        """Return `((images,), classes)`, or `(images,)` of a folder without classes."""
        pixels = torch.stack([self._read(path) for path in self.files[start:end]])
        shape = (1, -1, 1, 1)
        mean, std = torch.tensor(self.mean).view(shape), torch.tensor(self.std).view(shape)
        images = (pixels.float() / 255 - mean) / std
        return (images,) if self.labels is None else ((images,), self.labels[start:end])

    def _read(self, path: Path) -> Tensor:
        image = needed("PIL.Image", "a split of images")
        import numpy as np

        try:
            with image.open(path) as opened:
                found = opened.convert("L" if len(self.mean) == 1 else "RGB")
        except Exception as error:
            raise DataError(
                f"{path.name} cannot be read as an image",
                reason=f"{type(error).__name__}: {error}",
                hint="remove or repair it",
                where=str(path),
            ) from error
        array = np.asarray(self._scaled(found, image.Resampling.BILINEAR)).copy()
        return torch.from_numpy(array).reshape(*self.size, -1).permute(2, 0, 1)

    def _scaled(self, image: Any, how: Any) -> Any:
        height, width = self.size
        if self.fit == "stretch":
            return image.resize((width, height), how)
        factor = max(width / image.width, height / image.height)
        sides = (round(image.width * factor), round(image.height * factor))
        scaled = image.resize(tuple(map(max, sides, (width, height))), how)
        left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
        return scaled.crop((left, top, left + width, top + height))


def from_images(
    name: str,
    folder: Path,
    *,
    size: tuple[int, int],
    fit: Fit = "crop",
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    inputs: Sequence[InputSpec] = (),
    batch: int = 32,
    limit: int | None = None,
) -> Split:
    """Return a split of the images in a folder; sub-folders are classes, in the order of names.

    Images that lie in the folder itself, without sub-folders, have no labels.

    Args:
        name: The split's name.
        folder: The folder.
        size: Height and width of what the model gets.
        fit: How an image gets that size.
        mean: What is taken from each channel of values from 0 to 1; one number for grey images.
        std: What that is divided by.
        inputs: What the model takes.
        batch: Images in a batch.
        limit: Use the first images only.

    Raises:
        DataError: There is no such folder, or a class, or all of it, holds no image.
        MissingExtraError: Pillow is not installed, when the first image is read.
    """
    if not folder.is_dir():
        raise DataError(f"split {name}: there is no folder {folder.name}", where=str(folder))
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    groups = [_files(path) for path in classes] or [_files(folder)]
    for path, found in zip(classes or [folder], groups, strict=True):
        if not found:
            raise DataError(
                f"split {name}: there is no image in {path.name}",
                reason=f"images end in {', '.join(SUFFIXES)}",
                hint="give each class a sub-folder with its images",
                where=str(path),
            )
    numbers = [number for number, files in enumerate(groups) for _ in files]
    labels = torch.tensor(numbers) if classes else None
    files = tuple(path for group in groups for path in group)
    source = _Images(files, labels, size, fit, tuple(mean), tuple(std), batch)
    return Split(name, source, tuple(inputs), limit)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
