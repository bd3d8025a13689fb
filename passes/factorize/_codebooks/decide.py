"""The decision of `factorize.share_weights`."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxcompress.errors import NumericsError, SelectorError, UsageError
from fxcompress.ir.ops import op_name
from fxcompress.nn import Codebook
from fxcompress.pipeline._close import did_you_mean
from fxcompress.rewrite.edits import Declined
from passes._layers.quantizer import weight_node
from passes._paths import free_path, path_beside
from passes.factorize._codebooks.kmeans import cluster
from passes.factorize.share_weights import SharedWeight, ShareWeightsDecision
from passes.quantize._weight_only.layers import Layers, Weight, choose
from passes.quantize.weight_only import WeightOnlyOptions

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.factorize.share_weights import ShareWeightsOptions

__all__ = ["decide"]


def decide(
    program: Program, options: ShareWeightsOptions, context: Context
) -> ShareWeightsDecision:
    """Return the decision of `factorize.share_weights`."""
    names = ("targets", "types", "exclude", "expect", "embeddings")
    selection = {name: getattr(options, name) for name in names}
    chosen = choose(program, WeightOnlyOptions(**selection, bits=8, group=None))
    entries = _entries(chosen, options)
    declined = list(chosen.declined)
    taken = {name for name, _ in program.module.named_modules()} | set(program.state())
    state = program.state()
    found: list[SharedWeight] = []
    arrays: dict[str, Tensor] = {}
    for place, weight in enumerate(chosen.weights):
        context.progress("clustering weights", place + 1, len(chosen.weights))
        value = state[weight.tensor].detach()
        entry = _entry(chosen, weight, value, options, entries[weight.tensor], taken)
        reason = _masked(weight) or _misfit(entry, value)
        if reason:
            declined += [Declined(node=each, reason=reason) for each in entry.layers]
            continue
        taken.add(entry.path)
        if not value.is_meta:
            entry, arrays[entry.path] = _clustered(entry, weight, value, options)
        found.append(entry)
    if not found:
        raise UsageError(
            "there is no weight whose values can be shared",
            reason="; ".join(f"{each.node}: {each.reason}" for each in declined[:3]),
            hint="select other layers, take fewer entries, or take this pass out",
        )
    return ShareWeightsDecision(
        train=options.train, weights=tuple(found), declined=tuple(declined), arrays=dict(arrays)
    )


def _entries(chosen: Layers, options: ShareWeightsOptions) -> Mapping[str, int]:
    """Return how many entries each weight gets.

    Raises:
        SelectorError: A glob fits no layer.
    """
    readers = {w.tensor: [chosen.ids[node] for node in w.readers] for w in chosen.weights}
    names = [name for each in readers.values() for name in each]
    for glob in options.by_layer:
        if not any(fnmatchcase(name, glob) for name in names):
            raise SelectorError(
                f"`{glob}` in `by_layer` matches no selected layer",
                hint=did_you_mean(glob, names, kind="selected are"),
            )
    found = {}
    for tensor, layers in readers.items():
        fits = [
            count
            for glob, count in options.by_layer.items()
            if any(fnmatchcase(name, glob) for name in layers)
        ]
        found[tensor] = fits[0] if fits else options.entries
    return found


def _entry(
    chosen: Layers,
    weight: Weight,
    value: Tensor,
    options: ShareWeightsOptions,
    entries: int,
    taken: set[str],
) -> SharedWeight:
    reader, channels = weight.readers[0], value.shape[weight.axis]
    beside = str(reader.target) if reader.op == "call_module" else weight.tensor
    suffix = "_weight_codebook" if reader.op == "call_module" else "_codebook"
    rows = channels if options.rows is None else min(options.rows, channels)
    groups = -(-channels // rows)
    return SharedWeight(
        path=free_path(path_beside(beside, suffix), taken),
        tensor=weight.tensor,
        layers=tuple(chosen.ids[node] for node in weight.readers),
        entries=entries,
        groups=groups,
        axis=weight.axis if groups > 1 else None,
        rows=rows if groups > 1 else 1,
        elements=value.numel(),
    )


def _masked(weight: Weight) -> str:
    """Return why a weight under a mask stays, or an empty string."""
    read = [weight_node(reader) for reader in weight.readers]
    if any(each is not None and op_name(each) == "mask" for each in read):
        return "its weight has a mask: burn it in first"
    return ""


def _misfit(entry: SharedWeight, value: Tensor) -> str:
    """Return why a weight would not get smaller, or an empty string."""
    if value.dtype is torch.float64:
        return "its weights are float64; codebooks are float32"
    bits = (entry.entries - 1).bit_length()
    now = value.element_size() * 8 * entry.elements
    then = bits * entry.elements + 32 * entry.groups * entry.entries
    if then < now:
        return ""
    return (
        f"its {entry.elements:,} weights take {now // 8:,} bytes, and shared in {entry.groups} "
        f"codebooks {-(-then // 8):,}"
    )


@torch.no_grad()
def _clustered(
    entry: SharedWeight, weight: Weight, value: Tensor, options: ShareWeightsOptions
) -> tuple[SharedWeight, Tensor]:
    """Return the entry with its error, and the values of its codebooks.

    Raises:
        NumericsError: The weight holds a NaN or an infinity.
    """
    if not bool(value.isfinite().all()):
        raise NumericsError(
            f"a NaN or an infinity in {entry.tensor}", hint="check the weights", where=entry.tensor
        )
    rows = weight.rows(value.float().cpu())
    kept = options.zeros == "keep" and float((rows == 0).float().mean()) > 1 / entry.entries
    whole = len(rows) // entry.rows if entry.axis is not None else 1
    parts = [rows.reshape(1, -1)]
    if entry.axis is not None:
        even = rows[: whole * entry.rows].reshape(whole, -1)
        parts = [even, rows[whole * entry.rows :].reshape(1, -1)]
    found = torch.cat(
        [
            cluster(part, entry.entries, options.init, options.iterations, zero=kept)
            for part in parts
            if part.numel()
        ]
    )
    # As the weight's own type has them: then a weight and its entry are the same number.
    values = found.to(value.dtype).float()
    book = Codebook(entry.entries, groups=entry.groups, axis=entry.axis, rows=entry.rows)
    made = book.fit(values)(value.cpu()).double()
    given = value.cpu().double()
    energy = float(given.square().sum())
    error = float((made - given).square().sum()) / energy if energy > 0 else 0.0
    zeros = int((values == 0).any(1).sum())
    return entry.model_copy(update={"error": error, "zeros": zeros}), values
