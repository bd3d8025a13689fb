"""Which linear layers can be smoothed together, and why others cannot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import fx

from fxcompress.errors import UsageError
from fxcompress.rewrite.edits import Declined
from passes._paths import scope_beside
from passes.quantize._scaling.groups import Group, Reader, find_groups
from passes.quantize._scaling.layers import Blocked, layer_of, readers_of

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter
    from passes.quantize.smooth import Inserted, SmoothOptions

__all__ = ["LINEAR", "Candidate", "find_candidates", "insert", "nothing_to_smooth"]

LINEAR: Final = frozenset({"linear", "addmm"})


@dataclass(frozen=True)
class Candidate:
    """A group to smooth; `insert` if the division needs a multiplication of its own."""

    group: Group
    insert: bool


def find_candidates(
    program: Program,
    options: SmoothOptions,
    layers: Iterable[fx.Node],
    selected: set[fx.Node],
    ids: Mapping[fx.Node, str],
) -> tuple[list[Candidate], list[Declined]]:
    groups = find_groups(program)
    found: list[Candidate] = []
    done: set[fx.Node] = set()
    for group in groups.all:
        nodes = {reader.layer.node for reader in group.readers}
        if group.open and nodes & selected:
            found.append(Candidate(group, insert=False))
            done |= nodes
    declined = []
    inserted: dict[fx.Node, list[Reader]] = {}
    everybody = readers_of(program)
    for node in layers:
        if node in done:
            continue
        if node not in selected:
            declined.append(Declined(node=ids[node], reason="it is not selected"))
            continue
        try:
            layer = layer_of(program, node)
            if everybody.get(layer.weight) != [node]:
                raise Blocked(f"shares {layer.weight} with other nodes")
        except Blocked as blocked:
            declined.append(Declined(node=ids[node], reason=_own_reason(blocked)))
            continue
        if options.insert:
            channels = program.state()[layer.weight].shape[layer.columns]
            reader = Reader(layer, torch.arange(channels, dtype=torch.int32))
            inserted.setdefault(layer.input, []).append(reader)
        else:
            reason, because = groups.why_not(node, ids)
            declined.append(Declined(node=ids[node], reason=reason, because_of=because))
    for source, readers in inserted.items():
        free = torch.ones(len(readers[0].index), dtype=torch.bool)
        found.append(Candidate(Group(source, None, (), tuple(readers), free, (), ()), insert=True))
    order = {node: place for place, node in enumerate(ids)}
    found.sort(key=lambda each: order[each.group.producer])
    return found, declined


def _own_reason(blocked: Blocked) -> str:
    before = (
        ": run quantize.smooth before the pass that quantises"
        if "quantised" in str(blocked)
        else ""
    )
    return f"it {blocked}{before}"


def nothing_to_smooth(
    program: Program, layers: list[fx.Node], declined: Iterable[Declined]
) -> UsageError:
    left = [each for each in declined if each.reason != "it is not selected"]
    if not layers:
        return UsageError(
            "there is no layer to smooth",
            reason="the model has no linear layer; quantize.equalize is for convolutions",
            hint="take this pass out",
        )
    return UsageError(
        "there is no layer to smooth",
        reason="; ".join(f"{each.node}: {each.reason}" for each in left[:3]),
        hint="set `insert: true`, select other layers, or take this pass out",
    )


def insert(rewriter: GraphRewriter, entries: Iterable[Inserted], arrays: Mapping[str, Any]) -> None:
    """Multiply what layers read by new parameters."""
    for entry in entries:
        value = arrays.get(entry.tensor)
        factors = torch.ones(entry.channels) if value is None else torch.as_tensor(value)
        layers = {rewriter.node(layer) for layer in entry.layers}
        source = rewriter.node(entry.node)
        first = next(iter(rewriter.node(layer) for layer in entry.layers))
        kept = source.meta["val"].dtype
        rewriter.add_tensor(entry.tensor, factors.to(kept), trainable=True)
        scope = scope_beside(first)
        factor = rewriter.get_attr(entry.tensor, after=source, scope=scope)
        product = rewriter.call_function(torch.mul, (source, factor), after=factor, scope=scope)
        rewriter.replace_uses(source, product, only=layers.__contains__)
