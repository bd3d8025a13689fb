"""The decision of `quantize.equalize`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxcompress.errors import UsageError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import op_name
from fxcompress.pipeline.selectors import Selector
from fxcompress.rewrite.edits import Declined
from passes.quantize._rules import LAYERS
from passes.quantize._scaling.absorb import absorb
from passes.quantize._scaling.fold import Folds
from passes.quantize._scaling.groups import Group, Groups, find_groups
from passes.quantize._scaling.layers import Blocked, layer_of
from passes.quantize._scaling.ranges import Pair, Ranges
from passes.quantize.equalize import Equalized, EqualizeDecision
from passes.tidy._activations import replace
from passes.tidy.replace_activation import Replacement

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter
    from passes.quantize.equalize import EqualizeOptions

__all__ = ["decide", "replace_relu6"]

# Factors have settled when none changes by more in a round; nearer to 1 than _BALANCED is nothing.
_SETTLED, _BALANCED = 1e-6, 1e-3


@torch.no_grad()
def decide(program: Program, options: EqualizeOptions, context: Context) -> EqualizeDecision:
    """Return the decision of `quantize.equalize`."""
    ids = node_ids(program)
    layers = [node for node in program.nodes if op_name(node) in LAYERS]
    selected = set(Selector.of(options).select(program, layers))
    groups = find_groups(program, frozenset({"relu6"} if options.relu6 == "replace" else ()))
    pairs, declined = _pairs(program, groups, layers, selected, ids)
    if not pairs:
        raise UsageError(
            "there are no layers to equalise",
            reason="; ".join(f"{each.node}: {each.reason}" for each in declined[:3])
            or "the model has no convolution and no linear layer",
            hint="run quantize.equalize before the pass that quantises, or take it out",
        )
    if any(value.is_meta for value in program.state().values()):
        return _pending(program, pairs, declined, ids, "once the weights have values")
    if context.planning and options.absorb_bias and options.calibration:
        return _pending(
            program, pairs, declined, ids, f"after calibration ({options.calibration} samples)"
        )
    return _decided(program, options, context, pairs, declined, ids)


def _pairs(
    program: Program,
    groups: Groups,
    layers: Iterable[fx.Node],
    selected: set[fx.Node],
    ids: Mapping[fx.Node, str],
) -> tuple[tuple[Pair, ...], list[Declined]]:
    """Return the pairs all of whose layers are selected, and why other layers are in none."""
    pairs: list[Pair] = []
    reasons: dict[fx.Node, tuple[str, tuple[str, ...]]] = {}
    for group in groups.all:
        norm = group.producer if op_name(group.producer) == "batch_norm" else None
        node = group.producer if norm is None else norm.all_input_nodes[0]
        if op_name(node) not in LAYERS:
            continue
        members = [node, *(reader.layer.node for reader in group.readers)]
        if not all(each in selected for each in members):
            reasons[node] = "it, or a layer that reads it, is not selected", ()
        elif not group.open:
            reasons[node] = _stopped(group, ids)
        else:
            try:
                layer = group.layer or layer_of(program, node)
            except Blocked as blocked:
                reasons[node] = f"it {blocked}", ()
                continue
            pairs.append(Pair(group, layer, norm))
    producers = {pair.layer.node for pair in pairs}
    declined = []
    for node in layers:
        if node in producers:
            continue
        reason: tuple[str, tuple[str, ...]] | None = reasons.get(node)
        if node not in selected:
            reason = "it is not selected", ()
        elif reason is None and node in groups.refused:
            reason = f"it {groups.refused[node]}", ()
        what, because = reason or ("no layer reads it", ())
        declined.append(Declined(node=ids[node], reason=what, because_of=because))
    return tuple(pairs), declined


def _stopped(group: Group, ids: Mapping[fx.Node, str]) -> tuple[str, tuple[str, ...]]:
    if not group.stops:
        return "no layer reads it", ()
    stop = group.stops[0]
    more = ": set `relu6: replace`" if op_name(stop.node) == "relu6" else ""
    return f"{ids[stop.node]} reads it and {stop.reason}{more}", (ids[stop.node],)


def _pending(
    program: Program,
    pairs: Iterable[Pair],
    declined: Iterable[Declined],
    ids: Mapping[fx.Node, str],
    when: str,
) -> EqualizeDecision:
    folds = Folds(program.state())
    for pair in pairs:
        folds.add(pair.group, torch.ones(len(pair.group.free)))
    return EqualizeDecision(
        groups=tuple(_equalized(pair, ids) for pair in pairs),
        scaled=folds.decided()[0],
        replaced=_replaced(pairs, ids),
        declined=tuple(declined),
        pending=tuple(f"{ids[pair.layer.node]}: factors known {when}" for pair in pairs),
    )


def _equalized(pair: Pair, ids: Mapping[fx.Node, str], **more: Any) -> Equalized:
    return Equalized(
        source=ids[pair.group.producer],
        layers=tuple(ids[reader.layer.node] for reader in pair.group.readers),
        channels=int(pair.group.free.sum()),
        **more,
    )


def _replaced(pairs: Iterable[Pair], ids: Mapping[fx.Node, str]) -> tuple[str, ...]:
    nodes = {node for pair in pairs for node in pair.group.path if op_name(node) == "relu6"}
    return tuple(name for node, name in ids.items() if node in nodes)


def _decided(
    program: Program,
    options: EqualizeOptions,
    context: Context,
    pairs: tuple[Pair, ...],
    declined: list[Declined],
    ids: Mapping[fx.Node, str],
) -> EqualizeDecision:
    ranges = Ranges(pairs, program.state())
    before = [ranges.precision(pair) for pair in pairs]
    factors, rounds = _settle(ranges, pairs, options.iterations)
    folds = Folds(program.state())
    changed = [bool(((each - 1).abs() > _BALANCED).any()) for each in factors]
    for pair, each, worth in zip(pairs, factors, changed, strict=True):
        if worth:
            folds.add(pair.group, each)
    shifts, absorbed = absorb(program, options, context, pairs, folds, ids, declined)
    groups = []
    for pair, worth, start in zip(pairs, changed, before, strict=True):
        count = absorbed.get(pair.group.producer, 0)
        if worth or count:
            after = ranges.precision(pair)
            groups.append(_equalized(pair, ids, before=start, after=after, absorbed=count))
        else:
            name = ids[pair.layer.node]
            declined.append(Declined(node=name, reason="its ranges are equal already"))
    scaled, arrays = folds.decided()
    kept = [pair for pair, worth in zip(pairs, changed, strict=True) if worth]
    return EqualizeDecision(
        groups=tuple(groups),
        scaled=scaled,
        shifted=tuple(shifts),
        replaced=_replaced(kept, ids),
        rounds=rounds,
        declined=tuple(declined),
        arrays={**arrays, **{entry.key: value for entry, value in shifts.items()}},
    )


def _settle(ranges: Ranges, pairs: tuple[Pair, ...], most: int) -> tuple[list[Tensor], int]:
    """Return the product of each pair's factors over all rounds, and how many rounds it took."""
    found = [torch.ones(len(pair.group.free), dtype=torch.float64) for pair in pairs]
    for done in range(1, most + 1):
        change = 0.0
        for index, pair in enumerate(pairs):
            factors = ranges.factors(pair)
            ranges.apply(pair, factors)
            found[index] = found[index] * factors
            change = max(change, float((factors - 1).abs().max()))
        if change < _SETTLED:
            return found, done
    return found, most


def replace_relu6(rewriter: GraphRewriter, nodes: Iterable[str]) -> None:
    """Make ReLU6 nodes ReLU."""
    replace(rewriter, [Replacement(node=each, before="relu6", after="relu") for each in nodes])
