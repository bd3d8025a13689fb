"""The decision of `factorize.svd`: measure inputs, decompose weights, choose ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from fxcompress.errors import UsageError
from fxcompress.rewrite.edits import Declined
from passes._choices.outputs import output_losses
from passes._choices.programme import need_scipy
from passes._paths import free_path, path_beside
from passes.factorize._svd.layers import Layer, find_layers
from passes.factorize._svd.ranks import Cut, break_even, given_ranks, share
from passes.factorize._svd.spectrum import Moments, Spectrum, decompose, measure
from passes.factorize.svd import SvdDecision, SvdEntry

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.factorize.svd import SvdOptions

__all__ = ["decide"]

_NOTHING: Final = 1e-12
"""Lost energy, of all, that is only rounding: the layer has no more rank than that."""

_MEASURED: Final = 8
"""Samples on which the outputs are compared, once for each layer."""


def decide(program: Program, options: SvdOptions, context: Context) -> SvdDecision:
    """Return the decision of `factorize.svd`."""
    if options.budget is not None:
        need_scipy("factorize.svd")
    layers, declined = find_layers(program, options)
    if not layers:
        return SvdDecision(declined=declined)
    given = given_ranks(layers, options)
    state = program.state()
    if context.planning or any(state[layer.weight.tensor].is_meta for layer in layers):
        return _planned(program, options, layers, declined, given)
    moments: dict[str, Moments] = {}
    if options.whiten != "none":
        batches = context.samples("calibration", options.calibration)
        moments = measure(program, layers, batches)
    spectra = {}
    for index, layer in enumerate(layers):
        context.progress("decomposing weights", index + 1, len(layers))
        found = moments.get(layer.path)
        value = state[layer.weight.tensor]
        spectra[layer.path] = decompose(
            layer, value, found, options, centred=layer.bias is not None
        )
    losses = {layer.path: _relative(spectra[layer.path]) for layer in layers}
    if options.budget is not None and options.sensitivity == "output":
        losses = _measured(program, layers, spectra, moments, options, context)

    def loss(layer: Layer, rank: int) -> float:
        return losses[layer.path] * spectra[layer.path].lost(rank)

    ranks = _ranks(program, layers, options, given, spectra, loss)
    entries = _entries(program, layers, ranks)
    filled: list[SvdEntry] = []
    arrays: dict[str, Tensor] = {}
    for entry, layer in zip(entries, layers, strict=True):
        spectrum = spectra[layer.path]
        if entry.rank is not None:
            arrays |= _factors(program, entry, layer, spectrum)
            entry = entry.model_copy(
                update={
                    "energy": spectrum.energy(entry.rank),
                    "loss": loss(layer, entry.rank),
                }
            )
        filled.append(entry)
    return SvdDecision(
        layers=tuple(filled), declined=(*declined, *_whole(entries, options)), arrays=arrays
    )


def _relative(spectrum: Spectrum) -> float:
    """Return what makes a layer's lost energy relative to its own."""
    return 1.0 / spectrum.total if spectrum.total > 0 else 0.0


def _ranks(
    program: Program,
    layers: Sequence[Layer],
    options: SvdOptions,
    given: dict[str, int],
    spectra: dict[str, Spectrum],
    loss: Any,
) -> dict[str, int | None]:
    """Return path -> rank; None leaves a layer whole."""
    if options.budget is not None:
        return share(program, layers, options, given, loss)
    found: dict[str, int | None] = {}
    for layer in layers:
        rank: int | None = given.get(layer.path, options.rank)
        if layer.path not in given and options.energy is not None:
            least = spectra[layer.path].rank(options.energy)
            rank = -(-least // options.round_to) * options.round_to
        found[layer.path] = _worth(layer, rank, options, given)
    _check_something(layers, found, options)
    return found


def _worth(
    layer: Layer, rank: int | None, options: SvdOptions, given: dict[str, int]
) -> int | None:
    """Return the rank, or None where it would save nothing and was not asked for by name."""
    if rank is None or layer.path in given:
        return rank
    return rank if rank <= break_even(layer, 1) else None


def _check_something(
    layers: Sequence[Layer], ranks: dict[str, int | None], options: SvdOptions
) -> None:
    """Check that a rank for all fits at least one layer.

    Raises:
        UsageError: It saves nothing anywhere, or is above full rank everywhere.
    """
    if options.rank is None or any(rank is not None for rank in ranks.values()):
        return
    widest = max(layers, key=lambda layer: break_even(layer, 1), default=None)
    if widest is None:
        return
    raise UsageError(
        f"rank {options.rank} saves parameters in no layer",
        reason=f"{widest.path} is {widest.out} x {widest.columns}: "
        f"its full rank is {widest.full}, and ranks up to {break_even(widest, 1)} save some",
        hint="give a lower rank, or an energy",
    )


def _measured(
    program: Program,
    layers: Sequence[Layer],
    spectra: dict[str, Spectrum],
    moments: dict[str, Moments],
    options: SvdOptions,
    context: Context,
) -> dict[str, float]:
    """Return path -> what the model's outputs lose for each unit that the layer's lose."""
    state = program.state()
    cuts, plain = [], []
    for layer in layers:
        value = state[layer.weight.tensor]
        # A weight alone is exchanged here, and no bias: so the mean input counts.
        spectrum = spectra[layer.path]
        if spectrum.mean is not None:
            found = moments.get(layer.path)
            spectrum = decompose(layer, value, found, options, centred=False)
        rank = max(1, break_even(layer, 1) // 2)
        cut = partial(_truncated, layer, value, spectrum)
        cuts.append(Cut(layer.weight.tensor, layer.nodes, (rank,), cut))
        plain.append(spectrum.lost(rank))
    batches = context.samples("calibration", min(options.calibration, _MEASURED))
    noise = output_losses(program, cuts, batches, context, own=False)
    return {
        layer.path: row[0] / lost if lost > _NOTHING * spectra[layer.path].total else 0.0
        for layer, row, lost in zip(layers, noise, plain, strict=True)
    }


def _truncated(layer: Layer, value: Tensor, spectrum: Spectrum, rank: int) -> Tensor:
    factors = spectrum.factors(rank)
    whole = (factors.up @ factors.down).to(value.dtype)
    return layer.weight.form.weight(whole.unsqueeze(0), value)


def _planned(
    program: Program,
    options: SvdOptions,
    layers: Sequence[Layer],
    declined: Iterable[Declined],
    given: dict[str, int],
) -> SvdDecision:
    """Return ranks as far as no measurement is needed; for the rest, likely ones."""
    pending: tuple[str, ...] = ()
    if options.budget is not None:
        # As if singular values fell in a straight line to 0.
        ranks = share(
            program, layers, options, given, lambda layer, rank: (1 - rank / layer.full) ** 3
        )
    else:
        ranks = {}
        for layer in layers:
            rank = given.get(layer.path, options.rank)
            if layer.path not in given and options.energy is not None:
                rank = max(1, break_even(layer, options.round_to))
            ranks[layer.path] = _worth(layer, rank, options, given)
        _check_something(layers, ranks, options)
    if options.budget is not None or options.energy is not None:
        when = "calibration" if options.needs_data else "decomposing the weights"
        pending = tuple(
            f"{layer.path}: rank known after {when}" for layer in layers if layer.path not in given
        )
    entries = _entries(program, layers, ranks)
    return SvdDecision(
        layers=entries, declined=(*declined, *_whole(entries, options)), pending=pending
    )


def _entries(
    program: Program, layers: Sequence[Layer], ranks: dict[str, int | None]
) -> tuple[SvdEntry, ...]:
    known = {*program.state(), *(path for path, _ in program.module.named_modules())}
    entries = []
    for layer in layers:
        path = free_path(path_beside(layer.path, "_svd"), known)
        known.add(path)
        rank = ranks[layer.path]
        entries.append(
            SvdEntry(
                path=path,
                layer=layer.path,
                op=layer.op,
                weight=layer.weight.tensor,
                bias=layer.bias,
                nodes=layer.nodes,
                full=layer.full,
                rank=rank,
                parameters=(layer.parameters(None), layer.parameters(rank)),
            )
        )
    return tuple(entries)


def _factors(
    program: Program, entry: SvdEntry, layer: Layer, spectrum: Spectrum
) -> dict[str, Tensor]:
    """Return the tensors of A and B by name."""
    assert entry.rank is not None, "the layer is factorised"
    factors = spectrum.factors(entry.rank)
    state = program.state()
    dtype = state[layer.weight.tensor].dtype
    found = {
        f"{entry.path}.A.weight": factors.down.to(dtype).contiguous(),
        f"{entry.path}.B.weight": factors.up.to(dtype).contiguous(),
    }
    if entry.bias is not None:
        bias = state[entry.bias].detach()
        if factors.shift is not None:
            bias = (bias.double().cpu() + factors.shift).to(bias.dtype)
        found[f"{entry.path}.B.bias"] = torch.clone(bias)
    return found


def _whole(entries: Iterable[SvdEntry], options: SvdOptions) -> Iterable[Declined]:
    """Say why layers that were selected stay whole."""
    for entry in entries:
        if entry.rank is not None:
            continue
        weights = f"its {entry.parameters[0]:,} weights"
        if options.budget is not None:
            reason = "it stays whole: that is the best use of the budget"
        elif options.energy is not None:
            reason = f"keeping {options.energy:.4g} of its energy saves none of {weights}"
        elif options.rank is not None:
            reason = f"rank {options.rank} saves none of {weights}"
        else:
            reason = "no rank is given for it"
        for node in entry.nodes:
            yield Declined(node=node, reason=reason)
