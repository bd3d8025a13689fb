"""A batch norm folded into the layer before it while both are trained.

The layer must be trained on the weight that it will have when the norm is folded for good, but the
norm still normalises by each batch (Krishnamoorthi, 2018, arXiv:1806.08342, section 3.2.2; Jacob et
al., 2018, arXiv:1712.05877, figure C8). With s = γ / √(σ² + ε) of the running statistics:

    z = BatchNorm(layer(x, quantize(W · s)) / s)

In eval mode this is layer(x, quantize(W · s)) + β - μ·s: what folding gives, before and after. In
training the division undoes the scale exactly where the batch's own statistics take its place, so
every channel is corrected by σ_running / σ_batch.

Where a step is learned for each channel, the order is quantize(W) · s: the same numbers for a step
that is s times smaller. A step measured on W · s would be wrong by as much as the statistics move,
and with activations of few bits they move by factors within the first steps of training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxcompress.ir.ops import bind, module_of, op_name
from passes._paths import scope_beside

if TYPE_CHECKING:
    from fxcompress.rewrite import GraphRewriter

__all__ = [
    "TrainingFold",
    "end_training_fold",
    "folded_weights",
    "insert_training_fold",
    "match_training_fold",
    "running_scale",
]


@dataclass(frozen=True)
class TrainingFold:
    """The nodes of one: norm ← undo ← layer ← quantizer ← scaled ← weight.

    With `after`, the weight is scaled after its quantizer: layer ← scaled ← quantizer ← weight.
    """

    norm: fx.Node
    undo: fx.Node
    layer: fx.Node
    quantizer: fx.Node
    scaled: fx.Node
    weight: fx.Node
    after: bool = False


def running_scale(norm: Any) -> Tensor:
    """Return s of a batch norm, `[channels]`, in the arithmetic that the graph uses."""
    scale = torch.rsqrt(norm.running_var + norm.eps)
    return scale if norm.weight is None else norm.weight.detach() * scale


def folded_weights(norms: Mapping[fx.Node, fx.Node]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return, by the name of a layer's weight, weight and bias with its norm folded in."""
    found = {}
    for layer, norm in norms.items():
        module: Any = module_of(layer)
        statistics: Any = module_of(norm)
        scale = running_scale(statistics)
        weight = module.weight.detach() * scale.reshape(-1, *[1] * (module.weight.dim() - 1))
        bias = (
            -statistics.running_mean
            if module.bias is None
            else (module.bias.detach() - statistics.running_mean)
        )
        bias = bias * scale
        if statistics.bias is not None:
            bias = bias + statistics.bias.detach()
        found[f"{layer.target}.weight"] = weight, bias
    return found


def insert_training_fold(rewriter: GraphRewriter, layer: fx.Node, norm: fx.Node) -> None:
    """Let a layer that reads a quantised weight compute with the weight scaled by its norm.

    A bias of the layer goes into the running mean, which is the same in eval mode; in training the
    batch's mean takes it off anyway.
    """
    quantizer: Any = layer.args[1]
    weight = quantizer.args[0]
    path, place = str(layer.target), str(norm.target)
    module, statistics = rewriter.get_module(path), rewriter.get_module(place)
    if module.bias is not None:
        mean = rewriter.get_tensor(f"{place}.running_mean")
        bias = rewriter.get_tensor(f"{path}.bias").detach()
        rewriter.set_tensor(f"{place}.running_mean", mean - bias.to(mean.dtype))
        rewriter.remove_tensor(f"{path}.bias")
    scope = scope_beside(norm)

    def call(function: Any, *args: Any, after: fx.Node) -> fx.Node:
        return rewriter.call_function(function, args, after=after, scope=scope)

    variance = rewriter.get_attr(f"{place}.running_var", before=quantizer, scope=scope)
    scale = call(torch.add, variance, statistics.eps, after=variance)
    scale = call(torch.rsqrt, scale, after=scale)
    if statistics.weight is not None:
        gamma = rewriter.get_attr(f"{place}.weight", before=quantizer, scope=scope)
        scale = call(torch.mul, gamma, scale, after=gamma)
    rows = [-1] + [1] * (rewriter.get_tensor(f"{path}.weight").dim() - 1)
    per_row = call(torch.reshape, scale, rows, after=scale)
    fake: Any = rewriter.get_module(str(quantizer.target))
    if fake.learned and fake.axis == 0:
        name = f"{quantizer.target}.scale"
        step = rewriter.get_tensor(name).detach()
        rewriter.set_tensor(name, step / running_scale(statistics).abs().to(step.dtype))
        scaled = call(torch.mul, quantizer, per_row, after=quantizer)
        rewriter.set_args(layer, (layer.args[0], scaled), {})
    else:
        scaled = call(torch.mul, weight, per_row, after=per_row)
        rewriter.set_args(quantizer, (scaled,), {})
    per_channel = call(torch.reshape, scale, [1, *rows[:1], *rows[2:]], after=layer)
    undo = call(torch.div, layer, per_channel, after=per_channel)
    rewriter.set_args(norm, (undo, *norm.args[1:]), dict(norm.kwargs))


def match_training_fold(norm: fx.Node) -> TrainingFold | None:
    """Return the fold that a batch norm is the end of, or None."""
    undo = norm.all_input_nodes[0] if norm.all_input_nodes else None
    if norm.op != "call_module" or undo is None or op_name(undo) != "div" or len(undo.users) > 1:
        return None
    layer: Any = undo.all_input_nodes[0]
    operand: Any = layer.args[1] if layer.op == "call_module" and len(layer.args) > 1 else None
    if not isinstance(operand, fx.Node) or not operand.all_input_nodes:
        return None
    below = operand.all_input_nodes[0]
    after = op_name(operand) == "mul"
    scaled, quantizer = (operand, below) if after else (below, operand)
    if op_name(scaled) != "mul" or op_name(quantizer) != "fake_quant":
        return None
    weight: Any = quantizer.all_input_nodes[0] if after else bind(scaled).get("input")
    rows, channels = scaled.all_input_nodes[-1], undo.all_input_nodes[-1]
    same = rows.all_input_nodes[:1] == channels.all_input_nodes[:1]
    reads = {str(each.target) for each in _sources(rows)}
    own = f"{norm.target}.running_var" in reads
    if not (same and own and isinstance(weight, fx.Node) and module_of(layer).bias is None):
        return None
    return TrainingFold(norm, undo, layer, quantizer, scaled, weight, after)


def end_training_fold(rewriter: GraphRewriter, fold: TrainingFold) -> None:
    """Fold for good: the weight is the one that was quantised, the norm's shift is the bias."""
    path = str(fold.layer.target)
    name = f"{path}.weight"
    ((weight, bias),) = folded_weights({fold.layer: fold.norm}).values()
    old = rewriter.get_tensor(name)
    rewriter.set_tensor(name, weight.to(old.dtype))
    rewriter.add_tensor(f"{path}.bias", bias.to(old.dtype), trainable=True)
    if fold.after:
        _end_own_step(rewriter, fold)
    else:
        rewriter.set_args(fold.quantizer, (fold.weight,), {})
    rewriter.replace_uses(fold.norm, fold.layer)
    gone = [fold.norm, fold.undo, fold.scaled]
    scales = {each for node in (fold.undo, fold.scaled) for each in node.all_input_nodes[1:]}
    for node in gone:
        rewriter.remove(node)
    while scales:
        unread = next(node for node in scales if not node.users)
        scales |= set(unread.all_input_nodes)
        scales.remove(unread)
        rewriter.remove(unread)


def _end_own_step(rewriter: GraphRewriter, fold: TrainingFold) -> None:
    """Let the layer read quantize(W · s) with a step that is |s| times larger."""
    name = f"{fold.quantizer.target}.scale"
    step = rewriter.get_tensor(name).detach()
    scale = running_scale(module_of(fold.norm)).abs().to(step.dtype)
    rewriter.set_tensor(name, step * scale)
    rewriter.set_args(fold.layer, (fold.layer.args[0], fold.quantizer), {})


def _sources(node: fx.Node) -> set[fx.Node]:
    """Return the parameters and buffers that a node is computed from."""
    if node.op == "get_attr":
        return {node}
    return {each for source in node.all_input_nodes for each in _sources(source)}
