"""The decision of `quantize.smooth`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxcompress.errors import NumericsError, UsageError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import op_name
from fxcompress.pipeline.selectors import Selector
from fxcompress.rewrite.edits import Declined
from passes._observe import observe
from passes._paths import free_path, path_beside, scope_beside
from passes.quantize._scaling.fold import Folds
from passes.quantize._scaling.groups import Group, Reader, find_groups
from passes.quantize._scaling.layers import Blocked, layer_of, readers_of
from passes.quantize._scaling.search import (
    Found,
    Job,
    Seen,
    measure,
    search,
    smoothing_factors,
)
from passes.quantize.smooth import Inserted, SmoothDecision, Smoothed

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter
    from passes.quantize.smooth import SmoothOptions

__all__ = ["decide", "insert"]

_LINEAR = frozenset({"linear", "addmm"})
# Factors nearer to 1 than this are rounding.
_BALANCED = 1e-3
# What a multiplication must lower the error to, to be worth its time.
_WORTH = 0.9


@dataclass(frozen=True)
class _Candidate:
    """A group to smooth; `insert` if the division needs a multiplication of its own."""

    group: Group
    insert: bool


@torch.no_grad()
def decide(program: Program, options: SmoothOptions, context: Context) -> SmoothDecision:
    """Return the decision of `quantize.smooth`."""
    ids = node_ids(program)
    layers = [node for node in program.nodes if op_name(node) in _LINEAR]
    selected = set(Selector.of(options).select(program, layers))
    candidates, declined = _candidates(program, options, layers, selected, ids)
    if not candidates:
        raise _nothing(program, layers, declined)
    meta = any(value.is_meta for value in program.state().values())
    if context.planning or meta:
        when = f"after calibration ({options.calibration} samples)"
        return _pending(program, candidates, declined, ids, when)
    return _Deciding(program, options, ids, candidates, declined).run(context)


def _candidates(
    program: Program,
    options: SmoothOptions,
    layers: Iterable[fx.Node],
    selected: set[fx.Node],
    ids: Mapping[fx.Node, str],
) -> tuple[list[_Candidate], list[Declined]]:
    groups = find_groups(program)
    found: list[_Candidate] = []
    done: set[fx.Node] = set()
    for group in groups.all:
        nodes = {reader.layer.node for reader in group.readers}
        if group.open and nodes & selected:
            found.append(_Candidate(group, insert=False))
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
        found.append(_Candidate(Group(source, None, (), tuple(readers), free, (), ()), insert=True))
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


def _nothing(program: Program, layers: list[fx.Node], declined: Iterable[Declined]) -> UsageError:
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


def _pending(
    program: Program,
    candidates: Iterable[_Candidate],
    declined: Iterable[Declined],
    ids: Mapping[fx.Node, str],
    when: str,
) -> SmoothDecision:
    folds, taken = Folds(program.state()), _taken(program)
    inserted, groups = [], []
    for each in candidates:
        groups.append(_smoothed(each.group, ids, None))
        if each.insert:
            inserted.append(_inserted(each.group, ids, taken))
        else:
            folds.add(each.group, torch.ones(len(each.group.free)))
    return SmoothDecision(
        groups=tuple(groups),
        scaled=folds.decided()[0],
        inserted=tuple(inserted),
        declined=tuple(declined),
        pending=tuple(f"{each.source}: factors known {when}" for each in groups),
    )


def _smoothed(group: Group, ids: Mapping[fx.Node, str], found: Found | None) -> Smoothed:
    return Smoothed(
        source=ids[group.producer],
        layers=tuple(ids[reader.layer.node] for reader in group.readers),
        channels=int(group.free.sum()),
        alpha=None if found is None else found.alpha,
        before=None if found is None else found.before,
        after=None if found is None else found.after,
    )


def _taken(program: Program) -> set[str]:
    return {name for name, _ in program.module.named_modules()} | set(program.state())


def _inserted(group: Group, ids: Mapping[fx.Node, str], taken: set[str]) -> Inserted:
    layers = tuple(ids[reader.layer.node] for reader in group.readers)
    tensor = free_path(path_beside(layers[0], "_smooth"), taken)
    taken.add(tensor)
    return Inserted(
        node=ids[group.producer], tensor=tensor, layers=layers, channels=len(group.free)
    )


class _Deciding:
    def __init__(
        self,
        program: Program,
        options: SmoothOptions,
        ids: Mapping[fx.Node, str],
        candidates: list[_Candidate],
        declined: list[Declined],
    ) -> None:
        self.program, self.options, self.ids = program, options, ids
        self.candidates, self.declined = candidates, declined
        self.folds, self.taken = Folds(program.state()), _taken(program)

    def run(self, context: Context) -> SmoothDecision:
        seen = self._calibrate(context)
        groups, inserted, arrays = [], [], {}
        # From the last to the first: the rows of a layer are scaled before its columns are judged.
        for done, each in enumerate(reversed(self.candidates), 1):
            context.progress("smoothing", done, len(self.candidates))
            found = self._found(each.group, seen)
            if not self._worth(each, found):
                continue
            groups.append(_smoothed(each.group, self.ids, found))
            if not each.insert:
                self.folds.add(each.group, found.factors)
                continue
            entry = _inserted(each.group, self.ids, self.taken)
            inserted.append(entry)
            arrays[entry.tensor] = (1 / found.factors).float()
            for reader in each.group.readers:
                self.folds.multiply(reader.layer.weight, reader.layer.columns, found.factors)
        scaled, factors = self.folds.decided()
        return SmoothDecision(
            groups=tuple(reversed(groups)),
            scaled=scaled,
            inserted=tuple(reversed(inserted)),
            declined=tuple(self.declined),
            arrays={**factors, **arrays},
        )

    def _calibrate(self, context: Context) -> dict[fx.Node, Seen]:
        sources = {
            reader.layer.input
            for each in self.candidates
            for reader in each.group.readers
            if op_name(reader.layer.node) in _LINEAR
        }
        seen = {
            node: Seen(self.ids[node], self.options.calibration)
            for node in self.ids
            if node in sources
        }
        batches = context.samples("calibration", self.options.calibration)
        observe(self.program, batches, {node: each.update for node, each in seen.items()})
        return seen

    def _found(self, group: Group, seen: Mapping[fx.Node, Seen]) -> Found:
        """Return the factors of one group."""
        channels = len(group.free)
        inputs, weights = torch.zeros(channels), torch.zeros(channels)
        jobs = []
        for reader in group.readers:
            layer = reader.layer
            weight = self._weight(layer.weight)
            largest = reader.largest(layer.input_range(weight), channels)
            weights = torch.maximum(weights, largest)
            if op_name(layer.node) in _LINEAR:
                x = seen[layer.input]
                inputs = torch.maximum(inputs, reader.largest(x.largest, channels))
                jobs.append(Job(x, weight.movedim(layer.rows, 0), reader.index))
        chosen, steps = self.options.alpha, self.options.steps
        if chosen == "search":
            alphas = [step / steps for step in range(steps + 1)]
            return search(jobs, inputs, weights, group.free, alphas)
        return measure(jobs, smoothing_factors(inputs, weights, chosen, group.free), chosen)

    def _weight(self, name: str) -> Tensor:
        weight = self.folds.value(name).float()
        if not bool(weight.isfinite().all()):
            raise NumericsError(
                f"a NaN or an infinity in {name}",
                hint="check the weights that the model was given",
                where=name,
            )
        return weight

    def _worth(self, each: _Candidate, found: Found) -> bool:
        """Whether to smooth a group; a refusal is noted."""
        reason = ""
        if bool(((found.factors - 1).abs() < _BALANCED).all()):
            reason = "its inputs are balanced already: no smoothing has the least error"
        elif each.insert and found.after > _WORTH * found.before:
            less = 1 - found.after / found.before
            reason = f"a multiplication would lower its error by {max(less, 0):.0%} only"
        for reader in each.group.readers if reason else ():
            self.declined.append(Declined(node=self.ids[reader.layer.node], reason=reason))
        return not reason


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
