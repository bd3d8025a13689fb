"""The scale of a layer's input, window by window: the K of XNOR-Net.

K = A ∗ k with A = Σ_c |I_c| / C over the channels of an input and k = 1 / (w·h) (Rastegari et al.,
2016, arXiv:1603.05279, section 3.2): the mean size of what one output is computed from, zeros of
the padding included. The layer's result is multiplied by it (eq. 11).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from torch import fx

from fxcompress.ir.ops import bind, module_of, op_name
from passes._paths import scope_beside

if TYPE_CHECKING:
    from fxcompress.rewrite import GraphRewriter

__all__ = ["insert_input_scale", "obstacle"]

_POOLS: Final[dict[str, Any]] = {
    "conv1d": F.avg_pool1d,
    "conv2d": F.avg_pool2d,
    "conv3d": F.avg_pool3d,
}


def obstacle(layer: fx.Node) -> str | None:
    """Return why the result of a layer cannot be multiplied by the size of its input, or None."""
    op = op_name(layer)
    if op != "linear" and op not in _POOLS:
        return f"windows of a {op} are not defined"
    given = _settings(layer)
    if given["bias"] is not None:
        return "its bias would be multiplied too"
    if op == "linear":
        return None
    if given["groups"] != 1:
        return "its windows are over some of the channels"
    if set(given["dilation"]) != {1}:
        return "its windows have holes"
    if given["padding_mode"] != "zeros" or given["padding"] is None:
        return "it does not pad with zeros, alike on both sides"
    if any(2 * p > k for p, k in zip(given["padding"], given["kernel"], strict=True)):
        return "it pads by more than half a window"
    return None


def insert_input_scale(rewriter: GraphRewriter, source: fx.Node, layers: list[fx.Node]) -> None:
    """Multiply the results of layers by the mean sizes of the windows of `source`.

    They read the signs of it; `source` is `[batch, channels, ...]`, or `[..., features]` for linear
    layers.
    """
    scope = scope_beside(source)
    size = rewriter.call_function(torch.abs, (source,), after=source, scope=scope)
    means: dict[int, fx.Node] = {}
    for layer in layers:
        linear = op_name(layer) == "linear"
        dim = -1 if linear else 1
        if dim not in means:
            means[dim] = rewriter.call_function(
                torch.mean, (size, dim), {"keepdim": True}, after=size, scope=scope
            )
        scale, scope_here = means[dim], scope_beside(layer)
        if not linear:
            given = _settings(layer)
            scale = rewriter.call_function(
                _POOLS[op_name(layer)],
                (scale, list(given["kernel"]), list(given["stride"]), list(given["padding"])),
                after=layer,
                scope=scope_here,
            )
        after = layer if linear else scale
        made = rewriter.call_function(torch.mul, (layer, scale), after=after, scope=scope_here)
        rewriter.replace_uses(layer, made)


def _settings(layer: fx.Node) -> dict[str, Any]:
    """Return kernel, stride, padding and so on, one number per dimension; padding None if unlike.

    A `bias` is the node or the parameter, None without one.
    """
    if layer.op == "call_module":
        module: Any = module_of(layer)
        names = ("stride", "padding", "dilation", "groups", "padding_mode", "bias")
        given = {name: getattr(module, name, None) for name in names}
        weight = module.weight
    else:
        bound = bind(layer)
        defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "bias": None}
        given = {name: bound.get(name, default) for name, default in defaults.items()}
        given["padding_mode"] = "zeros"
        weight = bound["weight"].meta["val"]
    kernel = tuple(weight.shape[2:])
    given["kernel"] = kernel
    for name in ("stride", "padding", "dilation"):
        value = given[name]
        given[name] = (value,) * len(kernel) if isinstance(value, int) else value
    if isinstance(given["padding"], str):
        odd = all(k % 2 for k in kernel)
        same = tuple(k // 2 for k in kernel) if odd else None
        given["padding"] = (0,) * len(kernel) if given["padding"] == "valid" else same
    return given
