"""Make up for removed channels in the layers that read them, on calibration data.

For a layer y = W x + b whose input loses some of its columns, let x̃ be what it gets in the pruned
model and e = y − ỹ what its output then lacks, mean values ē and x̄. Layers are taken in graph
order, so that x̃ holds what was made up for before.

- `bias`: b' = b + ē. Where the removed channels are constant, that is exact.
- `least_squares`: W' = W_k + Δ with the Δ that minimises Σ |(e − ē) − Δ (x̃ − x̄)|² + λ|Δ|², so
  Δ = C_ex (C_xx + λI)⁻¹ for the covariances C, and b' = b + ē − Δ x̄. λ is `ridge` times the mean
  of C_xx's diagonal; large ones give `bias`. A convolution is a product with patches of its input.

A layer without a bias leaves ē to the running mean of the batch norm after it. Without either, Δ
minimises Σ |e − Δ x̃|² + λ|Δ|² with the sums about zero.

Sources: He et al., 2017, arXiv:1707.06168 (eq. 3, reconstruction); Ye et al., 2018,
arXiv:1802.00124 (absorbing constant channels).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from fxcompress.axes import Axis, Place, kept
from fxcompress.errors import DataError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import bind, module_of, op_name
from fxcompress.pipeline.base import Selection
from fxcompress.rewrite import Declined
from passes.prune._inputs import input_rows
from passes.prune._least_squares import Sums
from passes.prune._lockstep import Frontier
from passes.prune._weights import Weight, find_weights

if TYPE_CHECKING:
    from fxcompress.axes import Analysis
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.prune._compensation import Compensation

__all__ = ["Compensated", "compensate"]

Keep = Mapping[Axis, NDArray[np.int64]]


@dataclass(frozen=True)
class Compensated:
    """New values of tensors in their pruned shapes, by name; and what was left as it is."""

    values: dict[str, Tensor] = field(default_factory=dict)
    declined: tuple[Declined, ...] = ()


@dataclass(frozen=True)
class _Layer:
    """A layer that reads a pruned axis: in the dense and in the pruned Program.

    `shift` names the tensor that ē goes to: the bias (sign 1) or a running mean (sign −1).
    """

    name: str
    dense: Weight
    pruned: Weight
    outputs: Tensor
    shift: str | None
    sign: int


def compensate(
    program: Program,
    pruned: Program,
    analysis: Analysis,
    keep: Keep,
    options: Compensation,
    context: Context,
) -> Compensated:
    """Return the tensors that make up for what `keep` removes.

    Args:
        program: The Program before pruning.
        pruned: The same after the mechanical rewrite; not changed.
        analysis: The axes of `program`.
        keep: Axis -> kept indices, ascending.
        options: The method and its data.
        context: Calibration data.

    Raises:
        DataError: The split is missing or too small.
        NumericsError: Activations hold a NaN or an infinity.
    """
    if options.method == "none":
        return Compensated()
    if not context.has(options.data):
        raise DataError(
            f"compensation by {options.method} needs a split {options.data}",
            reason=f"the data has {', '.join(context.data) or 'no splits'}",
            hint=f"let the data factory return a split called {options.data!r}, or take "
            "`method: none`",
            where=options.data,
        )
    private = pruned.copy()
    layers, declined = _layers(program, private, analysis, keep, options)
    if not layers:
        return Compensated({}, declined)
    before = Frontier(program.copy(), context.samples(options.data, options.samples))
    after = Frontier(private, context.samples(options.data, options.samples))
    theirs = dict(zip(program.nodes, before.program.nodes, strict=True))
    values: dict[str, Tensor] = {}
    for done, layer in enumerate(layers):
        before.run_to(theirs[layer.dense.readers[0].node])
        after.run_to(layer.pruned.readers[0].node)
        made = _refit(layer, before, after, options)
        for name, value in made.items():
            after.set_tensor(name, value)
        values.update(made)
        context.progress("compensating", done + 1, len(layers))
    return Compensated(values, declined)


def _refit(
    layer: _Layer, before: Frontier, after: Frontier, options: Compensation
) -> dict[str, Tensor]:
    """Return the new weight and shift of one layer."""
    state = after.program.state()
    weight, form = state[layer.pruned.tensor].detach(), layer.pruned.form
    squares = options.method == "least_squares"
    sums = Sums(weight.numel() // weight.shape[form.out], weight.shape[form.out], squares)
    reader = layer.pruned.readers[0]
    for index, values in enumerate(after.values):
        lacks = _rows(before.result(index), form.taps).index_select(1, layer.outputs.cpu())
        lacks = lacks - _rows(after.result(index), form.taps)
        start = 0
        for _, rows in input_rows(reader, form, weight.shape, values):
            count = rows.shape[1]
            sums.add(rows[0], lacks[start : start + count])
            start += count
    sums.check(layer.name)
    change = sums.solve(options.ridge, centred=layer.shift is not None) if squares else None
    made = {}
    if change is not None:
        shape = form.matrices(weight).shape
        moved = form.matrices(weight).double() + change.reshape(shape).to(weight.device)
        made[layer.pruned.tensor] = form.weight(moved, weight.double()).to(weight.dtype)
    if layer.shift is not None:
        old = state[layer.shift].detach()
        move = sums.mean_lack - (0 if change is None else change @ sums.mean_row)
        made[layer.shift] = (old.double() + layer.sign * move.to(old.device)).to(old.dtype)
    return made


def _rows(output: Tensor, taps: tuple[int, ...]) -> Tensor:
    """Return an output as rows `[batch · positions, out]`, in the order of `input_rows`."""
    place = output.dim() - 1 - len(taps)
    return output.detach().movedim(place, -1).flatten(0, -2).cpu()


def _layers(
    program: Program, pruned: Program, analysis: Analysis, keep: Keep, options: Compensation
) -> tuple[list[_Layer], tuple[Declined, ...]]:
    """Return the layers to work on in graph order, and why others are left."""
    ids = node_ids(program)
    known = {weight.tensor: weight for weight in find_weights(program, Selection())[0]}
    theirs = {weight.tensor: weight for weight in find_weights(pruned, Selection())[0]}
    layers: list[_Layer] = []
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
        layers.append(_Layer(name, weight, other, outputs, shift, sign))
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
