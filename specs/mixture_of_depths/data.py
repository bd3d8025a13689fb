"""The King James Bible (public domain) as windows of characters, one piece of 20 held out.

The text is not part of this repository: on first use it is taken from Debian's packages
`bible-kjv` and `bible-kjv-text` (2.5 MB, kept in the user's cache), which need not be installed.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

Batch = tuple[Mapping[str, Tensor], Tensor]
"""`({input_ids [batch, 128]}, the same)`: what follows each character is in the window."""

WINDOW, PIECE, ONE_OF = 128, 8192, 20
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxcompress"


def bible(
    text: str | None = None, batch: int = 8, train: int = 2400, calibration: int = 64,
    evaluation: int = 256, seed: int = 0,
) -> Mapping[str, Sequence[Batch]]:  # fmt: skip
    """Return the splits `train` (random windows), `calibration` (of train) and `eval` (held out).

    `text` is a file of lines `Ge1:1 In the beginning …`; see `find_text` for the default.
    """
    lines = Path(text or find_text()).read_text(encoding="utf-8").splitlines()
    joined = "\n".join(line.partition(" ")[2] for line in lines)
    place = {each: index for index, each in enumerate(sorted(set(joined)))}
    ids = torch.tensor([place[each] for each in joined])
    pieces = ids[: len(ids) // PIECE * PIECE].view(-1, PIECE)
    held = torch.arange(len(pieces)) % ONE_OF == 0
    generator = torch.Generator().manual_seed(seed)
    own = pieces[~held]
    which = torch.randint(len(own), (train + calibration,), generator=generator)
    start = torch.randint(PIECE - WINDOW, (train + calibration, 1), generator=generator)
    windows = own[which].gather(1, start + torch.arange(WINDOW))
    rest = pieces[held].reshape(-1, WINDOW)
    rest = rest[:: max(1, len(rest) // evaluation)][:evaluation]
    return {
        "train": batches(windows[:train], batch),
        "calibration": batches(windows[train:], batch),
        "eval": batches(rest, batch),
    }


def batches(windows: Tensor, size: int) -> Sequence[Batch]:
    """Return windows `[count, 128]` as batches."""
    return [({"input_ids": each}, each) for each in windows.split(size)]


def find_text() -> Path:
    """Return the file of verses: the cache's, or made of Debian's packages.

    Raises `FileNotFoundError` with the ways to get it when it cannot be fetched.
    """
    path = CACHE / "kjv.txt"
    if path.is_file():
        return path
    try:
        with TemporaryDirectory() as folder:
            here = Path(folder)
            run = {"cwd": here, "check": True, "capture_output": True}
            subprocess.run(["apt-get", "download", "bible-kjv", "bible-kjv-text"], **run)
            for each in here.glob("*.deb"):
                subprocess.run(["dpkg", "-x", each.name, "."], **run)
            program = here / "usr" / "bin" / "bible"
            made = subprocess.run(
                [program, "-f", "gen1:1-rev22:21"], check=True, capture_output=True,
                cwd=here / "usr" / "lib",
            )  # fmt: skip
            found = here / "kjv.txt"
            found.write_bytes(made.stdout)
            CACHE.mkdir(parents=True, exist_ok=True)
            shutil.copy(found, path)
    except (OSError, subprocess.CalledProcessError) as error:
        raise FileNotFoundError(
            f"The verses are not in {path}, and Debian's packages bible-kjv and bible-kjv-text "
            f"could not be fetched ({error}). Name a file of lines `Ge1:1 In the beginning …` in "
            "the spec: data: {factory: ..., args: {text: FILE}}."
        ) from error
    return path
