"""Which layers make up for removed channels, and where the mean of what they lack can go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from fxcompress.axes import Axis, Place, kept
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import bind, module_of, op_name
from fxcompress.pipeline.base import Selection
from fxcompress.rewrite import Declined
from passes._layers.weights import Weight, find_weights

if TYPE_CHECKING:
    from fxcompress.axes import Analysis
    from fxcompress.ir import Program
    from passes.prune._compensate.options import Compensation

__all__ = ["Keep", "Layer", "find_layers"]

Keep = Mapping[Axis, NDArray[np.int64]]


@dataclass(frozen=True)
class Layer:
    """A layer that reads a pruned axis: in the dense and in the pruned Program.

    `shift` names the tensor that ē goes to: the bias (sign 1) or a running mean (sign −1).
    """

    name: str
    dense: Weight
    pruned: Weight
    outputs: Tensor
    shift: str | None
    sign: int


def find_layers(
    program: Program, pruned: Program, analysis: Analysis, keep: Keep, options: Compensation
) -> tuple[list[Layer], tuple[Declined, ...]]:
    """Return the layers to work on in graph order, and why others are left."""
    ids = node_ids(program)
    known = {weight.tensor: weight for weight in find_weights(program, Selection())[0]}
    theirs = {weight.tensor: weight for weight in find_weights(pruned, Selection())[0]}
    layers: list[Layer] = []
    declined: list[Declined] = []
    for tensor in _reading(keep, known):
        weight, other = known.get(tensor), theirs.get(tensor)
        if weight is None or other is None:
            reason = "it is no weight of a layer of its own, so nothing makes up for it"
            declined.append(Declined(node=tensor, reason=reason, because_of=()))
            continue
        name = ids[weight.readers[0].node]
        shift, sign = _shift(program, weight)
        reason = _obstacle(weight, shift, options)
        if reason:
            declined.append(Declined(node=name, reason=reason, because_of=()))
            continue
        outputs = torch.from_numpy(kept(analysis.places(tensor)[weight.form.out], keep))
        layers.append(Layer(name, weight, other, outputs, shift, sign))
    order = {node: place for place, node in enumerate(program.nodes)}
    layers.sort(key=lambda layer: order[layer.dense.readers[0].node])
    return layers, tuple(declined)


def _reading(keep: Keep, known: Mapping[str, Weight]) -> Iterable[str]:
    """Return the tensors that read an axis which loses indices."""

    def reads(place: Place) -> bool:
        weight = known.get(place.tensor)
        return place.role == "in" if weight is None else place.dim == weight.form.input

    return dict.fromkeys(
        place.tensor
        for axis, indices in keep.items()
        if len(indices) < axis.size
        for place in axis.places
        if reads(place)
    )


def _obstacle(weight: Weight, shift: str | None, options: Compensation) -> str:
    if len(weight.readers) > 1:
        return "it is called more than once, and its inputs are not known at one place"
    if weight.form.groups > 1 or weight.form.stack is not None:
        return "it holds several matrices: groups of a convolution, or experts"
    if weight.readers[0].left:
        return "its weight stands left of its input"
    if options.method == "bias" and shift is None:
        return "it has no bias of its own and no batch norm after it to take the mean"
    return ""


def _shift(program: Program, weight: Weight) -> tuple[str | None, int]:
    """Return the tensor that can take the mean of what a layer lacks, and with which sign."""
    node = weight.readers[0].node
    own = _bias(program, node)
    if own is not None:
        return own, 1
    users = list(node.users)
    if len(users) != 1 or users[0].op != "call_module" or _has_bias(node):
        return None, 1
    norm = module_of(users[0])
    calls = [each for each in program.nodes if each.target == users[0].target]
    if (
        isinstance(norm, nn.modules.batchnorm._BatchNorm)
        and norm.running_mean is not None
        and len(calls) == 1
    ):
        return f"{users[0].target}.running_mean", -1
    return None, 1


def _bias(program: Program, node: fx.Node) -> str | None:
    """Return the name of a bias that this layer alone reads."""
    if node.op == "call_module":
        name = f"{node.target}.bias"
    else:
        source: Any = bind(node).get("input" if op_name(node) == "addmm" else "bias")
        if not isinstance(source, fx.Node) or op_name(source) != "param" or len(source.users) > 1:
            return None
        name = str(source.target)
    value = program.state().get(name)
    tied = name in program.ties or name in program.ties.values()
    return None if value is None or tied or value.dim() != 1 else name


def _has_bias(node: fx.Node) -> bool:
    if node.op == "call_module":
        return getattr(module_of(node), "bias", None) is not None
    return op_name(node) == "addmm" or bind(node).get("bias") is not None
