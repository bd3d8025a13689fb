"""The decision of `quantize.smooth`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from fxcompress.errors import NumericsError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import op_name
from fxcompress.pipeline.selectors import Selector
from fxcompress.rewrite.edits import Declined
from passes._observe import observe
from passes._paths import free_path, path_beside
from passes.quantize._scaling.candidates import (
    LINEAR,
    Candidate,
    find_candidates,
    nothing_to_smooth,
)
from passes.quantize._scaling.fold import Folds
from passes.quantize._scaling.groups import Group
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
    from passes.quantize.smooth import SmoothOptions

__all__ = ["decide"]

# Factors nearer to 1 than this are rounding.
_BALANCED = 1e-3
# What a multiplication must lower the error to, to be worth its time.
_WORTH = 0.9


@torch.no_grad()
def decide(program: Program, options: SmoothOptions, context: Context) -> SmoothDecision:
    """Return the decision of `quantize.smooth`."""
    ids = node_ids(program)
    layers = [node for node in program.nodes if op_name(node) in LINEAR]
    selected = set(Selector.of(options).select(program, layers))
    candidates, declined = find_candidates(program, options, layers, selected, ids)
    if not candidates:
        raise nothing_to_smooth(program, layers, declined)
    meta = any(value.is_meta for value in program.state().values())
    if context.planning or meta:
        when = f"after calibration ({options.calibration} samples)"
        return _pending(program, candidates, declined, ids, when)
    return _Deciding(program, options, ids, candidates, declined).run(context)


def _pending(
    program: Program,
    candidates: Iterable[Candidate],
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
        candidates: list[Candidate],
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
            if op_name(reader.layer.node) in LINEAR
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
            if op_name(layer.node) in LINEAR:
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

    def _worth(self, each: Candidate, found: Found) -> bool:
        """Whether to smooth a group; a refusal is noted."""
        reason = ""
        if found.alpha is None:
            reason = "no smoothing has the least error"
        elif bool(((found.factors - 1).abs() < _BALANCED).all()):
            reason = "its channels are balanced already"
        elif each.insert and found.after > _WORTH * found.before:
            less = 1 - found.after / found.before
            reason = f"a multiplication would lower its error by {max(less, 0):.0%} only"
        for reader in each.group.readers if reason else ():
            self.declined.append(Declined(node=self.ids[reader.layer.node], reason=reason))
        return not reason
