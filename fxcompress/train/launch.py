"""Join the processes that `accelerate launch` or `torchrun` started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from fxcompress.train._extras import needed
from fxcompress.train._world import World

__all__ = ["joined"]


_PATIENCE = timedelta(hours=12)
"""How long processes wait for each other: the first may decide for hours what others are told.

One that dies is noticed at once all the same, when its connections close.
"""


@contextmanager
def joined() -> Iterator[World]:
    """Yield the processes that were started together; this one alone where none were.

    Raises:
        MissingExtraError: There are several, and accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    accelerate = needed("accelerate", "a run in several processes")
    state = accelerate.PartialState(timeout=_PATIENCE)
    try:
        yield World.here(torch.device(state.device))
    finally:
        state.destroy_process_group()
