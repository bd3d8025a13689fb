"""`F.multi_head_attention_forward` spelled out, so that heads and widths are visible."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.errors import CaptureError

__all__ = ["MultiHeadAttention"]


@dataclass(frozen=True)
class MultiHeadAttention:
    """A call of `F.multi_head_attention_forward`; the fields are its arguments.

    `query` is `[target, batch, embed]`, `key` and `value` are `[source, batch, …]`; without a batch
    all three are 2-D.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    embed_dim_to_check: int
    num_heads: int
    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None
    add_zero_attn: bool
    dropout_p: float
    out_proj_weight: Tensor
    out_proj_bias: Tensor | None
    training: bool = True
    key_padding_mask: Tensor | None = None
    need_weights: bool = True
    attn_mask: Tensor | None = None
    use_separate_proj_weight: bool = False
    q_proj_weight: Tensor | None = None
    k_proj_weight: Tensor | None = None
    v_proj_weight: Tensor | None = None
    static_k: Tensor | None = None
    static_v: Tensor | None = None
    average_attn_weights: bool = True
    is_causal: bool = False

    def __post_init__(self) -> None:
        own = (self.bias_k, self.bias_v, self.static_k, self.static_v)
        if self.add_zero_attn or any(each is not None for each in own):
            raise CaptureError(
                "this MultiheadAttention adds keys and values of its own",
                reason="bias_k, bias_v, add_zero_attn and static keys are not recorded",
                hint="mark the module as opaque",
            )

    def compute(self) -> tuple[Tensor, Tensor | None]:
        """Compute what the function computes, step by step.

        Returns the output in the layout of `query`, and the attention weights
        `[batch, target, source]` if `need_weights`.
        """
        if self.query.dim() == 3:
            return self._batched()
        padding = self.key_padding_mask
        one = replace(
            self,
            query=self.query.unsqueeze(1),
            key=self.key.unsqueeze(1),
            value=self.value.unsqueeze(1),
            key_padding_mask=None if padding is None else padding.unsqueeze(0),
        )
        output, weights = one._batched()
        return output.squeeze(1), None if weights is None else weights.squeeze(0)

    def _batched(self) -> tuple[Tensor, Tensor | None]:
        target, batch, _ = self.query.shape
        source = self.key.shape[0]
        q, k, v = self._projected()
        q = self._split(q, target, batch)
        k = self._split(k, source, batch)
        v = self._split(v, source, batch)
        mixed, weights = self._mixed(q, k, v, batch, source)
        mixed = mixed.permute(2, 0, 1, 3).reshape(target, batch, self.embed_dim_to_check)
        output = F.linear(mixed, self.out_proj_weight, self.out_proj_bias)
        if weights is not None and self.average_attn_weights:
            weights = weights.mean(dim=1)
        return output, weights

    def _projected(self) -> tuple[Tensor, Tensor, Tensor]:
        bias = self.in_proj_bias
        weights: tuple[Tensor | None, ...]
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if not self.use_separate_proj_weight:
            weight = self.in_proj_weight
            assert weight is not None, "one of the two forms of projection is given"
            if self.key is self.value and self.query is self.key:
                q, k, v = F.linear(self.query, weight, bias).chunk(3, dim=-1)
                return q, k, v
            weights = weight.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        inputs = (self.query, self.key, self.value)
        q, k, v = (
            F.linear(given, _given(weight), bias)
            for given, weight, bias in zip(inputs, weights, biases, strict=True)
        )
        return q, k, v

    def _split(self, projected: Tensor, length: Any, batch: Any) -> Tensor:
        """`[length, batch, embed]` -> `[batch, heads, length, width]`."""
        width = self.embed_dim_to_check // self.num_heads
        return projected.reshape(length, batch, self.num_heads, width).permute(1, 2, 0, 3)

    def _mixed(
        self, q: Tensor, k: Tensor, v: Tensor, batch: Any, source: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return the mixed values `[batch, heads, target, width]`, and what they are mixed by."""
        causal = self.is_causal and self.key_padding_mask is None and not self.need_weights
        mask = None if causal else self._mask(q, batch, source)
        if not self.need_weights:
            dropped = self.dropout_p if self.training else 0.0
            mixed = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropped, is_causal=causal
            )
            return mixed, None
        width = self.embed_dim_to_check // self.num_heads
        scores = torch.matmul(q * math.sqrt(1.0 / width), k.transpose(-2, -1))
        weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
        weights = F.dropout(weights, self.dropout_p, self.training)
        return torch.matmul(weights, v), weights

    def _mask(self, query: Tensor, batch: Any, source: Any) -> Tensor | None:
        mask = _additive(self.attn_mask, query)
        padding = _additive(self.key_padding_mask, query)
        if mask is not None and mask.dim() == 3:
            one = mask.shape[0] == 1
            mask = mask.unsqueeze(0) if one else mask.reshape(batch, self.num_heads, -1, source)
        if padding is not None:
            padding = padding.reshape(batch, 1, 1, source)
            mask = padding if mask is None else mask + padding
        return mask


def _given(weight: Tensor | None) -> Tensor:
    assert weight is not None, "separate projections come all three"
    return weight


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
