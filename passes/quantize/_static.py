"""What `quantize.static` decides: layers, placement, ranges and scales."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from fxcompress.errors import UsageError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import module_of, op_name
from fxcompress.nn import FakeQuantize
from fxcompress.rewrite import without_taps
from fxcompress.rewrite.edits import Declined
from passes._observe import observe
from passes._paths import free_path, path_beside
from passes._training_fold import folded_weights
from passes.quantize._build import activation_quantizer
from passes.quantize._float import float_shares
from passes.quantize._gates import gate_entries
from passes.quantize._layers import choose_layers
from passes.quantize._notes import activation_notes, weight_notes
from passes.quantize._observers import Observer, make_observer
from passes.quantize._placement import Placement, Site, place
from passes.quantize._rules import PRODUCTS
from passes.quantize._weights import weight_entries, weight_scales
from passes.quantize.static import ActivationEntry, Call, StaticDecision

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.quantize._options import ActivationOptions, StaticOptions
    from passes.quantize._overrides import Formats

__all__ = ["decide"]


@dataclass(frozen=True)
class _Quantizer:
    """A quantizer to be: its site in the graph, its entry without a range, how to find that."""

    site: Site
    entry: ActivationEntry
    chosen: ActivationOptions


def decide(
    program: Program,
    options: StaticOptions,
    context: Context,
    norms: Mapping[fx.Node, fx.Node] | None = None,
) -> StaticDecision:
    """Return the decision of `quantize.static`.

    `norms` says which batch norms are trained as part of the layer before them. Taps are no
    readers: what is quantised does not depend on them.
    """
    program = without_taps(program) if norms is None else program
    ids, norms = node_ids(program), dict(norms or {})
    layers = choose_layers(program, options, ids, norms)
    norms = {layer: norms[layer] for layer in layers.chosen if layer in norms}
    products = [
        node for node in program.nodes if options.products and op_name(node) in ("matmul", "bmm")
    ]
    placement = place(
        program.nodes, layers.chosen, products, layers.excluded, set(norms.values()), options.rules
    )
    declined = (*layers.declined, *_declined(program, placement, products, ids))
    if not layers.chosen:
        raise _nothing(declined)
    taken = {name for name, _ in program.module.named_modules()} | set(program.state())
    named = {**ids, **{norm: ids[layer] for layer, norm in norms.items()}}
    quantizers = _quantizers(placement, options, layers.formats, ids, named, taken)
    gates = gate_entries(placement, options.rules, ids, taken)
    weights = weight_entries(
        program, layers.chosen, options.weights, ids, taken, layers.formats, options.dtype
    )
    decision = StaticDecision(
        target=options.target,
        weights=weights,
        activations=tuple(each.entry for each in quantizers),
        gates=gates,
        in_float=float_shares(program, placement.kernels),
        notes=weight_notes(program, weights, layers.formats, layers.chosen, ids),
        declined=declined,
    )
    if context.planning:
        samples = f"known after calibration ({options.calibration} samples)"
        pending = tuple(f"{each.entry.path}.scale: {samples}" for each in quantizers)
        return decision.model_copy(update={"pending": pending})
    measured, unusual = _measure(program, options, context, quantizers, ids)
    input_scale = _input_scales(placement, quantizers, measured, ids)
    scales = weight_scales(program, weights, options.weights, input_scale, folded_weights(norms))
    notes = (*decision.notes, *unusual)
    return decision.model_copy(update={"activations": measured, "notes": notes, "arrays": scales})


def _nothing(declined: Collection[Declined]) -> UsageError:
    """Return the error for a model without a layer to quantise."""
    left = [each for each in declined if each.reason != "it is not selected"] or list(declined)
    done = all(each.reason == "it is quantised already" for each in left)
    return UsageError(
        "there is no layer to quantise" + (": the model is quantised already" if done else ""),
        reason="; ".join(f"{each.node}: {each.reason}" for each in left[:3]),
        hint="take this pass out, or the one before it that quantises"
        if done
        else "select other layers, or take this pass out",
    )


def _quantizers(
    placement: Placement,
    options: StaticOptions,
    formats: Formats,
    ids: dict[fx.Node, str],
    named: dict[fx.Node, str],
    taken: set[str],
) -> list[_Quantizer]:
    """Return the sites that add calls, in graph order, with paths of their own by `named`."""
    order = {node: index for index, node in enumerate(ids)}
    found = []
    sites = [site for site in placement.sites if site.calls]
    for site in sorted(sites, key=lambda site: min(order[node] for node in site.calls)):
        nodes = sorted(site.calls, key=order.__getitem__)
        if site.fixed is not None:
            path = str(site.fixed.target)
        else:
            path = free_path(path_beside(named[nodes[0]], "_fq"), taken)
            taken.add(path)
        makers = [placement.maker[owner] for owner in site.owners if owner in placement.maker]
        chosen = formats.of_activation(site.kernels or makers)
        entry = ActivationEntry(
            path=path,
            bits=chosen.bits,
            signed=options.signed,
            symmetric=options.symmetric,
            dtype=options.dtype,
            calls=tuple(Call(node=ids[n], readers=_readers(site.calls[n], ids)) for n in nodes),
            exists=site.fixed is not None,
        )
        found.append(_Quantizer(site, entry, chosen))
    return found


def _readers(users: Iterable[fx.Node] | None, ids: dict[fx.Node, str]) -> tuple[str, ...] | None:
    return None if users is None else tuple(sorted(ids[user] for user in users))


def _measure(
    program: Program,
    options: StaticOptions,
    context: Context,
    quantizers: list[_Quantizer],
    ids: dict[fx.Node, str],
) -> tuple[tuple[ActivationEntry, ...], tuple[str, ...]]:
    """Calibrate, and return the entries with their ranges, and notes on these."""
    observers: dict[int, Observer] = {}
    watched: dict[fx.Node, Observer] = {}
    for index, quantizer in enumerate(quantizers):
        if quantizer.site.fixed is None:
            owner = ids[quantizer.site.owners[0]]
            chosen = quantizer.chosen
            observer = make_observer(
                chosen.observer, owner, percentile=chosen.percentile, momentum=chosen.momentum
            )
            observers[index] = observer
            watched.update(dict.fromkeys(quantizer.site.owners, observer))
    batches = context.samples("calibration", options.calibration)
    observe(program, batches, {node: seen.update for node, seen in watched.items()})
    entries = tuple(
        _ranged(quantizer.entry, observers[index]) if index in observers else quantizer.entry
        for index, quantizer in enumerate(quantizers)
    )
    return entries, activation_notes({entries[i].path: seen for i, seen in observers.items()})


def _ranged(entry: ActivationEntry, observer: Observer) -> ActivationEntry:
    fake = activation_quantizer(entry)
    low, high = observer.range(fake)
    found: dict[str, float | int] = {"low": low, "high": high}
    if isinstance(fake, FakeQuantize):
        fake.fit(torch.tensor(low), torch.tensor(high))
        found["zero_point"] = int(fake.zero_point)
    else:
        fake.fit(torch.tensor(max(-low, high)))
    return entry.model_copy(update={**found, "scale": fake.scale.item()})


def _input_scales(
    placement: Placement,
    quantizers: list[_Quantizer],
    measured: Iterable[ActivationEntry],
    ids: dict[fx.Node, str],
) -> Callable[[str], float | None]:
    """Return the scale of the activation that a layer reads, by the layer's id."""
    by_site = {id(q.site): entry.scale for q, entry in zip(quantizers, measured, strict=True)}
    scales = {}
    for node, site in placement.input_site.items():
        if site.fixed is not None:
            fixed = module_of(site.fixed)
            scales[ids[node]] = float(fixed.scale) if isinstance(fixed.scale, Tensor) else None
        else:
            scales[ids[node]] = by_site.get(id(site))
    return scales.get


def _declined(
    program: Program, placement: Placement, products: list[fx.Node], ids: dict[fx.Node, str]
) -> Iterable[Declined]:
    for node, reason, because in placement.declined:
        names = tuple(ids[each] for each in because)
        yield Declined(node=ids[node], reason=reason, because_of=names)
    for node in program.nodes:
        if op_name(node) in PRODUCTS and node not in products:
            only = "" if op_name(node) in ("matmul", "bmm") else ", and has no integer kernel"
            yield Declined(node=ids[node], reason=f"it multiplies two activations{only}")
