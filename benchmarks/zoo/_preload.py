"""What every worker of the sweep needs; the fork server pays for it once.

The small capture keeps imports and first-use caches out of the times of the models.
"""

from __future__ import annotations

import logging

import torch

from ._torchvision import declare_operators

declare_operators()

import timm  # noqa: E402, F401
import torch.fx.experimental.symbolic_shapes  # noqa: E402
import torchvision  # noqa: E402, F401
import transformers  # noqa: E402
import transformers.modeling_utils  # noqa: E402

from fxcompress.ir import capture  # noqa: E402

torch.set_num_threads(1)
transformers.logging.set_verbosity(logging.ERROR)
capture(torch.nn.Linear(2, 2), (torch.ones(2, 2),))
