"""Fashion-MNIST (Zalando, MIT) as the splits that a spec names."""

import gzip
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Batch = tuple[tuple[Tensor, ...], Tensor]
"""`((images [batch, 1, 28, 28],), classes [batch])`."""

MEAN, STD = 0.2860, 0.3530  # of the 60,000 training images, pixels scaled to [0, 1]
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # apt install dataset-fashion-mnist
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fxcompress"
IMAGES, LABELS = 0x803, 0x801  # magic numbers of the idx format: uint8 with 3 and 1 dims


@dataclass(frozen=True)
class Batches:
    """A re-iterable, sized split; with a `seed` every pass over it is shuffled anew."""

    images: Tensor
    classes: Tensor
    size: int
    seed: int | None = None

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __iter__(self) -> Iterator[Batch]:
        if self.seed is None:
            order = torch.arange(len(self.images))
        else:
            generator = torch.Generator().manual_seed(self.seed)
            order = torch.randperm(len(self.images), generator=generator)
        for index in order.split(self.size):
            yield (self.images[index],), self.classes[index]


def fashion_mnist(
    root: str | None = None, batch: int = 250, calibration: int = 1000, seed: int = 0
) -> Mapping[str, Sequence[Batch] | Batches]:
    """Return the splits `train` (60,000), `calibration` (of train) and `eval` (10,000).

    `root` is a folder with the four `*-ubyte.gz` files; see `find_root` for the default.
    """
    folder = Path(root) if root is not None else find_root()
    images, classes = load(folder, "train")
    test_images, test_classes = load(folder, "t10k")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(images), generator=generator)[:calibration]
    return {
        "train": Batches(images, classes, batch, seed),
        "calibration": Batches(images[chosen], classes[chosen], batch),
        "eval": Batches(test_images, test_classes, batch),
    }


def find_root() -> Path:
    """Return the folder of the four files: Debian's package, the cache, or a download into it.

    Raises `FileNotFoundError` with the ways to get the data when there is no network.
    """
    cached = CACHE / "FashionMNIST" / "raw"
    for folder in (DEBIAN, cached):
        if (folder / "train-images-idx3-ubyte.gz").is_file():
            return folder
    try:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(str(CACHE), download=True)
    except Exception as error:
        raise FileNotFoundError(
            f"Fashion-MNIST is neither in {DEBIAN} nor in {cached}, and it could not be "
            f"downloaded ({error}). Install Debian's dataset-fashion-mnist, or put the four "
            f"*-ubyte.gz files of https://github.com/zalandoresearch/fashion-mnist in {cached}, "
            "or name their folder in the spec: data: {factory: ..., args: {root: FOLDER}}."
        ) from error
    return cached


def load(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Read normalised images `[n, 1, 28, 28]` and classes `[n]` of `train` or `t10k`."""
    pixels = read_idx(folder / f"{part}-images-idx3-ubyte.gz", IMAGES)
    classes = read_idx(folder / f"{part}-labels-idx1-ubyte.gz", LABELS)
    images = (torch.from_numpy(pixels).float() / 255 - MEAN) / STD
    return images.unsqueeze(1), torch.from_numpy(classes).long()


def read_idx(path: Path, magic: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Read one gzipped idx file; raises `ValueError` if it is not one of `magic`'s kind."""
    raw = gzip.decompress(path.read_bytes())
    found = int.from_bytes(raw[:4], "big")
    if found != magic:
        raise ValueError(f"{path} is no idx file of the kind {magic:#x}: it starts {found:#x}")
    dims = magic & 0xFF
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape).copy()
