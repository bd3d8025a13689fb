"""`F.multi_head_attention_forward` spelled out, so that heads and widths are visible."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.errors import CaptureError

__all__ = ["multi_head_attention"]


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute what `F.multi_head_attention_forward` computes, step by step.

    `query` is `[target, batch, embed]`, `key` and `value` are `[source, batch, …]`; without a batch
    all three are 2-D. Returns the output in the layout of `query`, and the attention weights
    `[batch, target, source]` if `need_weights`.
    """
    if bias_k is not None or bias_v is not None or add_zero_attn or static_k is not None:
        raise CaptureError(
            "this MultiheadAttention adds keys and values of its own",
            reason="bias_k, bias_v, add_zero_attn and static keys are not recorded",
            hint="mark the module as opaque",
        )
    batched = query.dim() == 3
    if not batched:
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
    target, batch, _ = query.shape
    source = key.shape[0]
    q, k, v = _project(
        query, key, value, in_proj_weight, in_proj_bias, q_proj_weight, k_proj_weight,
        v_proj_weight, use_separate_proj_weight,
    )  # fmt: skip
    width = embed_dim_to_check // num_heads
    # [length, batch, embed] -> [batch, heads, length, width]
    q = q.reshape(target, batch, num_heads, width).permute(1, 2, 0, 3)
    k = k.reshape(source, batch, num_heads, width).permute(1, 2, 0, 3)
    v = v.reshape(source, batch, num_heads, width).permute(1, 2, 0, 3)
    causal = is_causal and key_padding_mask is None and not need_weights
    mask = None if causal else _mask(attn_mask, key_padding_mask, q, batch, num_heads, source)
    probability = dropout_p if training else 0.0
    weights = None
    if need_weights:
        scores = torch.matmul(q * math.sqrt(1.0 / width), k.transpose(-2, -1))
        weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
        weights = F.dropout(weights, dropout_p, training)
        mixed = torch.matmul(weights, v)
    else:
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=probability, is_causal=causal
        )
    mixed = mixed.permute(2, 0, 1, 3).reshape(target, batch, embed_dim_to_check)
    output = F.linear(mixed, out_proj_weight, out_proj_bias)
    if weights is not None and average_attn_weights:
        weights = weights.mean(dim=1)
    if not batched:
        output = output.squeeze(1)
        weights = None if weights is None else weights.squeeze(0)
    return output, weights


def _project(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    v_weight: Tensor | None,
    separate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if not separate:
        assert weight is not None, "one of the two forms of projection is given"
        if key is value and query is key:
            q, k, v = F.linear(query, weight, bias).chunk(3, dim=-1)
            return q, k, v
        q_weight, k_weight, v_weight = weight.chunk(3)
    q_bias, k_bias, v_bias = (None, None, None) if bias is None else bias.chunk(3)
    assert q_weight is not None, "separate projections come all three"
    assert k_weight is not None, "separate projections come all three"
    assert v_weight is not None, "separate projections come all three"
    return (
        F.linear(query, q_weight, q_bias),
        F.linear(key, k_weight, k_bias),
        F.linear(value, v_weight, v_bias),
    )


def _mask(
    mask: Tensor | None, padding: Tensor | None, query: Tensor, batch: Any, heads: int, source: Any
) -> Tensor | None:
    mask = _additive(mask, query)
    padding = _additive(padding, query)
    if mask is not None and mask.dim() == 3:
        mask = mask.reshape(batch, heads, -1, source) if mask.shape[0] != 1 else mask.unsqueeze(0)
    if padding is not None:
        padding = padding.reshape(batch, 1, 1, source)
        mask = padding if mask is None else mask + padding
    return mask


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
