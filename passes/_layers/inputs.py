"""What a layer multiplies with its weight: rows of inputs, one matrix per group.

A convolution is a product with the patches of its input. The patches come from a convolution, too:
its kernels are one-hot, one per tap, so every stride, padding, dilation and transposition is the
layer's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcompress.ir.ops import bind, module_of, op_name
from passes._layers.form import Form
from passes._layers.weights import Reader

__all__ = ["Rows", "input_rows"]

Rows = Iterator[tuple[slice, Tensor]]
"""Which groups, and their inputs `[groups, rows, taps · in]`."""

_CONVOLUTIONS: Final[Mapping[str, Callable[..., Tensor]]] = {
    "conv1d": F.conv1d,
    "conv2d": F.conv2d,
    "conv3d": F.conv3d,
    "conv_transpose1d": F.conv_transpose1d,
    "conv_transpose2d": F.conv_transpose2d,
    "conv_transpose3d": F.conv_transpose3d,
}
# Elements of patches that are made at a time: 256 MiB of float32.
_PATCHES: Final = 1 << 26


def input_rows(reader: Reader, form: Form, shape: torch.Size, env: Mapping[fx.Node, Any]) -> Rows:
    """Yield the inputs of one call of a layer, in float32.

    Args:
        reader: The layer.
        form: Of its weight.
        shape: Of its weight.
        env: The values of its operands.
    """
    node, op = reader.node, op_name(reader.node)
    bound = bind(node)
    x = env[bound[reader.operand]].detach().float()
    if op in _CONVOLUTIONS:
        yield from _patches(node, op, form, shape, x)
    elif op == "grouped_mm":
        yield from _per_expert(x, env[bound["offs"]] if "offs" in bound else None)
    else:
        yield from _products(x, reader, form, shape)


def _products(x: Tensor, reader: Reader, form: Form, shape: torch.Size) -> Rows:
    x = x.transpose(-1, -2) if reader.left else x
    if reader.expert is not None:
        yield slice(reader.expert, reader.expert + 1), x.reshape(1, -1, x.shape[-1])
    elif form.stack is None:
        yield slice(None), x.reshape(1, -1, x.shape[-1])
    else:
        experts = shape[form.stack]
        if x.dim() < 3 or x.shape[-3] != experts:
            rows = x.reshape(1, -1, x.shape[-1]).expand(experts, -1, -1)
        else:
            rows = x.movedim(-3, 0).reshape(experts, -1, x.shape[-1])
        yield slice(None), rows


def _per_expert(x: Tensor, ends: Tensor | None) -> Rows:
    """Yield each expert's tokens: rows up to its end in `ends` `[experts]`, or a batch."""
    if ends is None or x.dim() == 3:
        yield slice(None), x
        return
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            yield slice(expert, expert + 1), x[start:end].unsqueeze(0)
        start = end


def _patches(node: fx.Node, op: str, form: Form, shape: torch.Size, x: Tensor) -> Rows:
    spatial = len(form.taps)
    x = x if x.dim() == spatial + 2 else x.unsqueeze(0)
    x, settings = _geometry(node, op, x)
    kernel = [shape[d] for d in form.taps]
    channels, taps = x.shape[1], torch.Size(kernel).numel()
    one_hot = torch.eye(taps, device=x.device).reshape(taps, *kernel)
    if op.startswith("conv_transpose"):
        weight = one_hot.expand(channels, taps, *kernel)
    else:
        weight = one_hot.unsqueeze(1).repeat(channels, 1, *[1] * spatial)
    groups = form.groups
    positions = max(1, x[0, 0].numel())
    step = max(1, _PATCHES // (channels * taps * positions))
    for part in torch.split(x, step):
        made = _CONVOLUTIONS[op](part, weight, None, groups=channels, **settings)
        # [batch, groups, in, taps, positions] -> [groups, batch · positions, taps · in]
        made = made.reshape(len(part), groups, channels // groups, taps, -1)
        rows = made.permute(1, 0, 4, 3, 2).reshape(groups, -1, taps * (channels // groups))
        yield slice(None), rows


def _geometry(node: fx.Node, op: str, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Return the input, padded where the layer pads with other than zeros, and the settings."""
    names = ["stride", "padding", "dilation"]
    names += ["output_padding"] if op.startswith("conv_transpose") else []
    if node.op != "call_module":
        bound = bind(node)
        return x, {name: bound[name] for name in names if name in bound}
    module: Any = module_of(node)
    settings = {name: getattr(module, name) for name in names}
    if isinstance(module, nn.modules.conv._ConvNd) and module.padding_mode != "zeros":
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        settings["padding"] = 0
    return x, settings
