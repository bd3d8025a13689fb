"""Block influence: how far the direction of a hidden state moves within a block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.errors import NumericsError
from fxcompress.ir.ops import op_name, op_spec
from passes.depth._blocks import Region, ends

__all__ = ["Influence", "last_tokens"]


class Influence:
    """One minus the mean cosine between a block's input and output, over tokens or pixels."""

    def __init__(self, region: Region) -> None:
        self.path = region.path
        self.entry, self.exit = ends(region)
        self.axis = _feature_axis(region, self.entry)
        self.state: Tensor | None = None
        self.mask: Tensor | None = None
        self.total, self.weight = 0.0, 0.0

    def weigh(self, mask: Tensor) -> None:
        """Take the attention mask of a batch, `[batch, seq]`."""
        self.mask = mask

    def enter(self, state: Tensor) -> None:
        """Take h_in."""
        self.state = state

    def leave(self, state: Tensor) -> None:
        """Take h_out, and let h_in go."""
        assert self.state is not None, "the entry comes before the exit"
        cosine = torch.cosine_similarity(self.state.float(), state.float(), dim=self.axis)
        self.state = None
        if not bool(torch.isfinite(cosine).all()):
            raise NumericsError(
                f"a NaN or an infinity in the hidden state of {self.path}",
                hint="check the data and the weights",
                where=self.path,
            )
        mask = self.mask
        if mask is not None and mask.shape == cosine.shape:
            kept = cosine * (mask > 0)
            self.total += float(kept.double().sum())
            self.weight += float((mask > 0).sum())
        else:
            self.total += float(cosine.double().sum())
            self.weight += cosine.numel()

    def value(self) -> float:
        """Return 1 − the mean cosine; 0 for a block that changes nothing."""
        return 1.0 - self.total / max(self.weight, 1.0)


def last_tokens(state: Tensor, region: Region, mask: Any) -> Tensor:
    """Return `[batch, features]`: the last token that is no padding, or all of an image."""
    state = state.detach().double()
    entry, _ = ends(region)
    if state.dim() != 3 or _feature_axis(region, entry) != -1:
        return state.reshape(len(state), -1)
    last = torch.full((len(state),), state.shape[1] - 1, device=state.device)
    if isinstance(mask, Tensor) and mask.shape == state.shape[:2]:
        places = torch.arange(state.shape[1], device=state.device)
        last = (places * (mask > 0)).amax(1)
    return state[torch.arange(len(state), device=state.device), last]


def _feature_axis(region: Region, entry: fx.Node) -> int:
    """Return the axis of the features: 1 where a convolution or its norm reads the input."""
    inside = set(region.nodes)
    for user in entry.users:
        if user not in inside:
            continue
        name = op_name(user)
        spec = op_spec(name)
        if name.startswith("conv") or name in ("batch_norm", "group_norm", "instance_norm"):
            return 1
        if name in ("linear", "layer_norm", "rms_norm"):
            return -1
        if spec is not None and spec.kind == "pool":
            return 1
    value = entry.meta.get("val")
    return 1 if isinstance(value, Tensor) and value.dim() == 4 else -1
