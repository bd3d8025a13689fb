"""The fake results of LSTM, GRU and RNN, from their documented shapes.

Their kernels read sizes as plain numbers, so they do not run on symbolic ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["recurrent_result"]


def recurrent_result(module: nn.RNNBase, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return output and final states of a recurrent layer, or None for a packed sequence.

    With `batch_first` the input is `[batch, time, features]`, else `[time, batch, features]`;
    without a batch it is `[time, features]`. States are `[layers × directions, batch, hidden]`.
    """
    x = args[0] if args else kwargs.get("input")
    if not isinstance(x, torch.Tensor) or x.dim() not in (2, 3):
        return None
    if not isinstance(x.shape[-1], int) or x.shape[-1] != module.input_size:
        return None
    directions = 2 if module.bidirectional else 1
    hidden = module.proj_size or module.hidden_size
    depth = module.num_layers * directions
    output = x.new_empty((*x.shape[:-1], directions * hidden))
    batch = () if x.dim() == 2 else (x.shape[0 if module.batch_first else 1],)
    state = x.new_empty((depth, *batch, hidden))
    if isinstance(module, nn.LSTM):
        return output, (state, x.new_empty((depth, *batch, module.hidden_size)))
    return output, state
