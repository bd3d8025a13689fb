"""What every task needs; the fork server pays for it once.

A tiny network is pruned by both sides, to keep imports and first calls out of the times of models.
"""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.zoo import _preload  # noqa: F401  (the model libraries, imported once)
from fxcompress.ir import capture

from ._ours import decide, rewrite
from ._peer import prune_with_peer, recipe

_network = nn.Sequential(
    *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 4, 4))
).eval()
_images = torch.randn(2, 3, 4, 4)
_program = capture(_network, (_images,))
rewrite(_program, decide(_program, 0.5))
_inputs = ((_images,), {})
prune_with_peer(_network, _inputs, recipe(_network, _inputs, text=False), 0.5)
