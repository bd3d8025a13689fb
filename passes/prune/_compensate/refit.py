"""Make up for removed channels in the layers that read them, on calibration data.

For a layer y = W x + b whose input loses some of its columns, let x̃ be what it gets in the pruned
model and e = y − ỹ what its output then lacks, mean values ē and x̄. Layers are taken in graph
order, so that x̃ holds what was made up for before.

- `bias`: b' = b + ē. Where the removed channels are constant, that is exact.
- `least_squares`: W' = W_k + Δ with the Δ that minimises Σ |(e − ē) − Δ (x̃ − x̄)|² + λ|Δ|², so
  Δ = C_ex (C_xx + λI)⁻¹ for the covariances C, and b' = b + ē − Δ x̄. λ is `ridge` times the mean
  of C_xx's diagonal, and `auto` chooses it for each layer; large ones give `bias`. A convolution is
  a product with patches of its input.

A layer without a bias leaves ē to the running mean of the batch norm after it. Without either, Δ
minimises Σ |e − Δ x̃|² + λ|Δ|² with the sums about zero.

Sources: He et al., 2017, arXiv:1707.06168 (eq. 3, reconstruction); Ye et al., 2018,
arXiv:1802.00124 (absorbing constant channels).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from fxcompress.errors import DataError
from fxcompress.rewrite import Declined
from passes._layers.frontier import Frontier
from passes._layers.inputs import input_rows
from passes.prune._compensate.layers import Keep, Layer, find_layers
from passes.prune._compensate.least_squares import Sums
from passes.prune._compensate.ridge import choose_ridge, first_held_out

if TYPE_CHECKING:
    from fxcompress.axes import Analysis
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.prune._compensate.options import Compensation

__all__ = ["Compensated", "compensate"]


@dataclass(frozen=True)
class Compensated:
    """What compensation comes to.

    Attributes:
        values: New values of tensors in their pruned shapes, by name.
        declined: What was left as it is, and why.
        ridges: The ridge of each layer for which it was chosen.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    declined: tuple[Declined, ...] = ()
    ridges: dict[str, float] = field(default_factory=dict)


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
    layers, declined = find_layers(program, private, analysis, keep, options)
    if not layers:
        return Compensated({}, declined)
    before = Frontier(program.copy(), context.samples(options.data, options.samples))
    after = Frontier(private, context.samples(options.data, options.samples))
    theirs = dict(zip(program.nodes, before.program.nodes, strict=True))
    found = Compensated({}, declined)
    for done, layer in enumerate(layers):
        before.run_to(theirs[layer.dense.readers[0].node])
        after.run_to(layer.pruned.readers[0].node)
        made = _refit(layer, before, after, options, found.ridges)
        for name, value in made.items():
            after.set_tensor(name, value)
        found.values.update(made)
        context.progress("compensating", done + 1, len(layers))
    return found


def _refit(
    layer: Layer,
    before: Frontier,
    after: Frontier,
    options: Compensation,
    ridges: dict[str, float],
) -> dict[str, Tensor]:
    """Return the new weight and shift of one layer; write down the ridge if it was chosen."""
    state = after.program.state()
    weight, form = state[layer.pruned.tensor].detach(), layer.pruned.form
    sums, held = _sums(layer, weight, before, after, options)
    sums.check(layer.name)
    held.check(layer.name)
    change, made = None, {}
    if options.method == "least_squares":
        centred = layer.shift is not None
        ridge = options.ridge
        if ridge == "auto":
            ridge = ridges[layer.name] = choose_ridge(sums, held, centred=centred)
            sums.take(held)
        change = sums.solve(ridge, centred=centred)
        shape = form.matrices(weight).shape
        moved = form.matrices(weight).double() + change.reshape(shape).to(weight.device)
        made[layer.pruned.tensor] = form.weight(moved, weight.double()).to(weight.dtype)
    if layer.shift is not None:
        old = state[layer.shift].detach()
        move = sums.mean_lack - (0 if change is None else change @ sums.mean_row)
        made[layer.shift] = (old.double() + layer.sign * move.to(old.device)).to(old.dtype)
    return made


def _sums(
    layer: Layer, weight: Tensor, before: Frontier, after: Frontier, options: Compensation
) -> tuple[Sums, Sums]:
    """Return the sums over rows to fit to, and over those held out to choose the ridge."""
    reader, form = layer.pruned.readers[0], layer.pruned.form
    squares = options.method == "least_squares"
    choosing = squares and options.ridge == "auto"
    columns, out = weight.numel() // weight.shape[form.out], weight.shape[form.out]
    sums, held = Sums(columns, out, squares), Sums(columns, out, choosing)
    for index, values in enumerate(after.values):
        lacks = _rows(before.result(index), form.taps).index_select(1, layer.outputs.cpu())
        lacks = lacks - _rows(after.result(index), form.taps)
        kept = len(lacks)
        if choosing:
            kept = first_held_out(index, len(after.values), len(lacks))
        start = 0
        for _, rows in input_rows(reader, form, weight.shape, values):
            end = start + rows.shape[1]
            cut = min(max(kept, start), end)
            sums.add(rows[0, : cut - start], lacks[start:cut])
            held.add(rows[0, cut - start :], lacks[cut:end])
            start = end
    return sums, held


def _rows(output: Tensor, taps: tuple[int, ...]) -> Tensor:
    """Return an output as rows `[batch · positions, out]`, in the order of `input_rows`."""
    place = output.dim() - 1 - len(taps)
    return output.detach().movedim(place, -1).flatten(0, -2).cpu()
