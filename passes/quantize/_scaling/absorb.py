"""Bias absorption: a part of a bias that a ReLU keeps goes through it to the next layer.

With c below nearly all values of y, relu(y) = relu(y - c) + c, so that

    W₂ relu(W₁x + b₁) + b₂ = W₂ relu(W₁x + b₁ - c) + (b₂ + W₂c)

(Nagel et al., 2019, arXiv:1906.04721, section 4.1.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx

from fxcompress.ir.ops import bind, module_of, op_name
from fxcompress.rewrite.edits import Declined
from passes._observe import observe
from passes.quantize._scaling.entries import Shifted
from passes.quantize._scaling.fold import Folds
from passes.quantize._scaling.groups import Reader
from passes.quantize._scaling.layers import Blocked, Layer
from passes.quantize._scaling.moments import Moments
from passes.quantize._scaling.ranges import Pair

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.quantize.equalize import EqualizeOptions

__all__ = ["absorb"]

_DEVIATIONS: Final = 3.0
# f(y + c) = f(y) + c where y is positive, channel by channel.
_SHIFTS: Final = frozenset(
    {
        "relu", "relu6", "leaky_relu", "prelu", "identity", "dropout", "dropout1d", "dropout2d",
        "dropout3d", "contiguous", "clone", "max_pool1d", "max_pool2d", "max_pool3d",
        "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "adaptive_avg_pool1d",
        "adaptive_avg_pool2d", "adaptive_avg_pool3d", "mean", "view", "reshape", "flatten",
        "unflatten", "squeeze", "unsqueeze", "transpose", "permute",
    }
)  # fmt: skip


def absorb(
    program: Program,
    options: EqualizeOptions,
    context: Context,
    pairs: tuple[Pair, ...],
    folds: Folds,
    ids: Mapping[fx.Node, str],
    declined: list[Declined],
) -> tuple[dict[Shifted, Tensor], dict[fx.Node, int]]:
    """Return what is added to which biases, and by producer how many channels are absorbed.

    Args:
        program: With the weights as they were.
        options: Whether to absorb at all.
        context: Holds the calibration data.
        pairs: The pairs, equalised.
        folds: Their factors.
        ids: Of nodes.
        declined: Takes the pairs that cannot be absorbed, and why.
    """
    if not options.absorb_bias:
        return {}, {}
    fitting = []
    for pair in pairs:
        try:
            _check(pair, ids)
            if pair.norm is None and not options.calibration:
                raise Blocked("no batch norm tells its statistics, and `calibration` is 0")
            fitting.append(pair)
        except Blocked as blocked:
            reason = f"its bias is not absorbed: {blocked}"
            declined.append(Declined(node=ids[pair.layer.node], reason=reason))
    seen = _calibrate(program, options, context, fitting)
    added: dict[Shifted, Tensor] = {}
    counts: dict[fx.Node, int] = {}
    for pair in fitting:
        moved = _moved(pair, folds, seen.get(pair.layer.node))
        if not bool((moved > 0).any()):
            continue
        counts[pair.group.producer] = int((moved > 0).sum())
        _add(added, _own_bias(pair, len(moved)), -moved)
        for reader in pair.group.readers:
            weight = folds.value(reader.layer.weight)
            _add(added, _bias(reader.layer, weight), _constant(reader, moved, weight))
    return added, counts


def _check(pair: Pair, ids: Mapping[fx.Node, str]) -> None:
    for node in pair.group.path:
        if op_name(node) not in _SHIFTS:
            raise Blocked(f"{ids[node]} does not hand a constant on")
    for reader in pair.group.readers:
        layer = reader.layer
        if layer.transposed:
            raise Blocked(f"a constant does not reach every output of {ids[layer.node]} alike")
        if _pads_zeros(layer.node):
            raise Blocked(f"the zeros that {ids[layer.node]} pads would not get it")
        if layer.bias is None and layer.node.op != "call_module":
            raise Blocked(f"{ids[layer.node]} is a function call without a bias")
    if pair.norm is not None and len(pair.group.parts) == 1:
        raise Blocked("its batch norm has no bias")
    if pair.layer.bias is None and pair.layer.node.op != "call_module":
        raise Blocked("it is a function call without a bias")


def _pads_zeros(node: fx.Node) -> bool:
    if op_name(node) in ("linear", "addmm"):
        return False
    module: Any = module_of(node) if node.op == "call_module" else None
    padding = bind(node).get("padding", 0) if module is None else module.padding
    if padding == "valid" or (module is not None and module.padding_mode != "zeros"):
        return False
    sizes = padding if isinstance(padding, (tuple, list)) else (padding,)
    return any(bool(size) for size in sizes)


def _calibrate(
    program: Program, options: EqualizeOptions, context: Context, pairs: list[Pair]
) -> dict[fx.Node, Moments]:
    seen = {
        pair.layer.node: Moments(str(pair.layer.node.target), pair.layer.dim)
        for pair in pairs
        if pair.norm is None
    }
    if seen:
        batches = context.samples("calibration", options.calibration)
        observe(program, batches, {node: each.update for node, each in seen.items()})
    return seen


def _moved(pair: Pair, folds: Folds, seen: Moments | None) -> Tensor:
    """Return c of each channel, `[channels]`, as the layer is once it is scaled."""
    if pair.norm is not None:
        gamma, beta = (folds.value(part.tensor) for part in pair.group.parts)
        low = beta - _DEVIATIONS * gamma.abs()
    else:
        assert seen is not None, "it was calibrated"
        low = seen.mean - _DEVIATIONS * seen.deviation
        divisor = folds.factors.get(f"{pair.layer.weight}.divisor")
        low = low if divisor is None else low / divisor
    return torch.where(pair.group.free, low.clamp_min(0), 0.0)


def _own_bias(pair: Pair, channels: int) -> Shifted:
    if pair.norm is not None:
        return Shifted(tensor=pair.group.parts[1].tensor, channels=channels, new=False)
    name = pair.layer.bias or f"{pair.layer.node.target}.bias"
    return Shifted(tensor=name, channels=channels, new=pair.layer.bias is None)


def _bias(layer: Layer, weight: Tensor) -> Shifted:
    name = layer.bias or f"{layer.node.target}.bias"
    return Shifted(tensor=name, channels=weight.shape[layer.rows], new=layer.bias is None)


def _constant(reader: Reader, moved: Tensor, weight: Tensor) -> Tensor:
    """Return W₂ c, `[outputs]`."""
    known = moved[reader.index.clamp_min(0).long()]
    per_input = torch.where(reader.index >= 0, known, 0.0)
    by = weight * reader.layer.over_inputs(per_input, weight)
    return by.movedim(reader.layer.rows, 0).flatten(1).sum(dim=1)


def _add(added: dict[Shifted, Tensor], entry: Shifted, value: Tensor) -> None:
    known = added.get(entry)
    added[entry] = value if known is None else known + value
