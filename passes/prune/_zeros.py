"""Decide which entries of weights become zero, and what the others become."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx

from fxcompress.errors import UsageError
from fxcompress.ir.naming import node_ids
from fxcompress.nn import Mask
from fxcompress.rewrite import GraphRewriter
from fxcompress.rewrite.edits import Declined
from passes._paths import free_path, path_beside
from passes.prune._calibrate import Env, advance, stream
from passes.prune._inputs import input_rows
from passes.prune._masks import pack, pruned_weight
from passes.prune._patterns import Pattern
from passes.prune._select import check_scores
from passes.prune._sparsegpt import sparsegpt
from passes.prune._sparsity import SparseWeight, SparsityDecision
from passes.prune._statistics import Gram, Norms, Statistics
from passes.prune._weights import Reader, Weight, find_weights

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.prune._sparsity import SparsityOptions

__all__ = ["decide"]

# Elements of Hessians that are factored at a time: 512 MiB in double precision.
_AT_ONCE = 1 << 26


@dataclass
class _Zeros:
    """What was found: zeros `[groups, out, columns]` per tensor, and new rows where computed."""

    zeros: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)


def decide(
    program: Program, options: SparsityOptions, pattern: Pattern, context: Context
) -> SparsityDecision:
    """Return the zeros of every selected weight; without them where only a run can know.

    Raises:
        SelectorError: The selection fits no layer, or not as many as expected.
        UsageError: No weight can be pruned, or all of one would be.
        DataError: The calibration split is missing or too small.
        NumericsError: A NaN or an infinity in weights or in what they are multiplied with.
    """
    job = _Job.of(program, options, pattern)
    if not job.weights:
        raise _nothing(job.declined)
    pending = job.pending(context)
    if pending:
        return job.decision([job.entry(each, None) for each in job.weights], pending=pending)
    found = job.find(context)
    entries: list[SparseWeight] = []
    arrays: dict[str, Any] = {}
    for weight in job.weights:
        zeros, rows = found.zeros[weight.tensor], found.rows.get(weight.tensor)
        reason = job.unchanged(weight, zeros, rows)
        if reason is not None:
            job.decline(weight, reason)
            continue
        entries.append(job.entry(weight, zeros))
        arrays.update(job.arrays(weight, zeros, rows))
    if not entries:
        raise _nothing(job.declined)
    return job.decision(entries, arrays=arrays)


@dataclass
class _Job:
    """A private copy of the Program under calibration, and what is pruned of it."""

    scratch: GraphRewriter
    options: SparsityOptions
    pattern: Pattern
    weights: list[Weight]
    declined: list[Declined]
    ids: Mapping[fx.Node, str]

    @classmethod
    def of(cls, program: Program, options: SparsityOptions, pattern: Pattern) -> _Job:
        scratch = GraphRewriter(program)
        weights, declined = find_weights(scratch.program, options)
        job = cls(scratch, options, pattern, [], list(declined), node_ids(scratch.program))
        for weight in weights:
            shape = weight.form.matrices(job.value(weight)).shape
            reason = pattern.obstacle(weight, shape)
            if reason is None:
                job.weights.append(weight)
            else:
                job.decline(weight, reason)
        return job

    def value(self, weight: Weight) -> Tensor:
        return self.scratch.get_tensor(weight.tensor)

    def mask(self, weight: Weight) -> Tensor | None:
        """Return the mask that a weight has already, True where kept."""
        if weight.mask is None:
            return None
        return cast(Mask, self.scratch.get_module(weight.mask)).mask

    def fixed(self, weight: Weight) -> Tensor | None:
        """Return the entries that a mask holds at zero already, `[groups, out, columns]`."""
        mask = self.mask(weight)
        return None if mask is None else ~weight.form.rows(mask)

    def decline(self, weight: Weight, reason: str) -> None:
        self.declined += [
            Declined(node=self.ids[each.node], reason=reason) for each in weight.readers
        ]

    def pending(self, context: Context) -> tuple[str, ...]:
        """Return what cannot be known now, per weight."""
        meta = any(self.value(each).is_meta for each in self.weights)
        when = ""
        if self.options.criterion != "magnitude" and context.planning:
            when = f"known after calibration ({self.options.calibration} samples)"
        elif meta:
            when = "known once the weights have values"
        return tuple(f"{each.tensor}: zeros {when}" for each in self.weights) if when else ()

    # -- which entries -------------------------------------------------------------------------

    def find(self, context: Context) -> _Zeros:
        if self.options.criterion == "sparsegpt":
            return _SparseGPT(self, context).run()
        norms: dict[str, Statistics] = {}
        if self.options.criterion == "wanda":
            norms = self._norms(context)
        scores = {}
        for weight in self.weights:
            value = self.value(weight)
            found = weight.form.rows(value if value.dtype == torch.float64 else value.float()).abs()
            if weight.tensor in norms:
                norms[weight.tensor].check()
                found = found * norms[weight.tensor].sum.sqrt().to(found)[:, None, :]
            check_scores(found, weight.tensor)
            fixed = self.fixed(weight)
            scores[weight.tensor] = found if fixed is None else found.masked_fill(fixed, -1.0)
        zeros = self.pattern.zeros(scores)
        # What was pruned before stays so, even where less is asked for now.
        return _Zeros({name: each | (scores[name] < 0) for name, each in zeros.items()})

    def _norms(self, context: Context) -> dict[str, Statistics]:
        norms: dict[str, Statistics] = {}
        readers = _by_node(self.weights)
        for weight in self.weights:
            groups, _, columns = weight.form.rows(self.value(weight)).shape
            norms[weight.tensor] = Norms(weight.tensor, groups, columns)

        def see(node: fx.Node, env: Env) -> None:
            weight, reader = readers[node]
            shape = self.value(weight).shape
            for groups, rows in input_rows(reader, weight.form, shape, env):
                norms[weight.tensor].add(groups, rows)

        batches = context.samples("calibration", self.options.calibration)
        stream(self.scratch.program, batches, readers, see)
        return norms

    # -- the decision --------------------------------------------------------------------------

    def unchanged(self, weight: Weight, zeros: Tensor, rows: Tensor | None) -> str | None:
        """Return why a weight stays as it is, or None.

        Raises:
            UsageError: All of it would be zero.
        """
        if bool(zeros.all()):
            raise UsageError(
                f"every entry of {weight.tensor} would become zero",
                reason="its layer would give nothing but its bias",
                hint="lower the ratio or threshold, exclude the layer, or use `scope: layer`",
                where=weight.tensor,
            )
        if not bool(zeros.any()):
            return "none of its weights is to be pruned: the ratio or threshold is too small"
        value = self.value(weight)
        made = pruned_weight(weight.form, value, zeros, rows)
        mask = self.mask(weight)
        held = None if mask is None else weight.form.rows(~mask)
        as_asked = held is None if self.options.mode == "burn" else _same(held, zeros)
        return "it is as sparse already" if as_asked and torch.equal(made, value) else None

    def entry(self, weight: Weight, zeros: Tensor | None) -> SparseWeight:
        path = weight.mask
        if path is None and self.options.mode == "keep":
            owner = next((r.node for r in weight.readers if r.node.op == "call_module"), None)
            named = weight.tensor if owner is None else f"{owner.target}_weight"
            state = self.scratch.program.state()
            taken = {name for name, _ in self.scratch.module.named_modules()} | set(state)
            path = free_path(path_beside(named, "_mask"), taken)
        return SparseWeight(
            tensor=weight.tensor,
            layers=tuple(self.ids[each.node] for each in weight.readers),
            form=weight.form,
            entries=self.value(weight).numel(),
            zeros=None if zeros is None else int(zeros.sum()),
            mask=path,
            masked=weight.mask is not None,
        )

    def arrays(self, weight: Weight, zeros: Tensor, rows: Tensor | None) -> dict[str, Any]:
        value = self.value(weight)
        mask = weight.form.weight(zeros, value)
        found: dict[str, Any] = {f"{weight.tensor}.zeros": pack(mask)}
        if rows is not None:
            found[f"{weight.tensor}.kept"] = pruned_weight(weight.form, value, zeros, rows)[~mask]
        return found

    def decision(
        self,
        entries: Sequence[SparseWeight],
        *,
        arrays: Mapping[str, Any] | None = None,
        pending: tuple[str, ...] = (),
    ) -> SparsityDecision:
        zeros = sum(each.zeros or 0 for each in entries)
        sparsity = None if pending else round(zeros / sum(each.entries for each in entries), 6)
        sizes = (getattr(self.pattern, "n", None), getattr(self.pattern, "m", None))
        return SparsityDecision(
            criterion=self.options.criterion,
            mode=self.options.mode,
            weights=tuple(entries),
            declined=tuple(self.declined),
            pattern=None if sizes[0] is None else cast(tuple[int, int], sizes),
            sparsity=sparsity,
            arrays=dict(arrays or {}),
            pending=pending,
        )


class _SparseGPT:
    """Prunes layer after layer, each on what the pruned layers before it give.

    A weight that several layers read is pruned when the last of them is reached, on the inputs of
    all of them.
    """

    def __init__(self, job: _Job, context: Context) -> None:
        self.job, self.context = job, context
        self.readers = _by_node(job.weights)
        self.grams: dict[str, Gram] = {}
        self.found = _Zeros()

    def run(self) -> _Zeros:
        options = self.job.options
        batches = self.context.samples("calibration", options.calibration)
        # The copy is pruned on the way; decide() compares with the weights that were given.
        values = {each.tensor: self.job.value(each) for each in self.job.weights}
        advance(self.job.scratch.program, batches, self.readers, self._see, self._prune)
        for name, value in values.items():
            self.job.scratch.set_tensor(name, value, tied=True)
        return self.found

    def _see(self, node: fx.Node, env: Env) -> None:
        weight, reader = self.readers[node]
        value = self.job.value(weight)
        gram = self.grams.get(weight.tensor)
        if gram is None:
            groups, _, columns = weight.form.rows(value).shape
            gram = self.grams[weight.tensor] = Gram(weight.tensor, groups, columns)
        for part, rows in input_rows(reader, weight.form, value.shape, env):
            gram.add(part, rows)

    def _prune(self, node: fx.Node) -> None:
        weight, reader = self.readers[node]
        if reader is not weight.readers[-1]:
            return
        gram = self.grams.pop(weight.tensor)
        gram.check()
        value = self.job.value(weight)
        check_scores(value, weight.tensor)
        rows, zeros = self._solve(weight, weight.form.rows(value), gram.sum)
        self.found.zeros[weight.tensor] = zeros
        self.found.rows[weight.tensor] = rows
        made = pruned_weight(weight.form, value, zeros, rows)
        self.job.scratch.set_tensor(weight.tensor, made, tied=True)
        self.context.progress("pruning", len(self.found.zeros), len(self.job.weights))

    def _solve(self, weight: Weight, rows: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
        options, fixed = self.job.options, self.job.fixed(weight)
        groups, _, columns = rows.shape
        step = max(1, _AT_ONCE // columns**2)
        solved = []
        for start in range(0, groups, step):
            part = slice(start, start + step)
            held = None if fixed is None else fixed[part]
            choose, width, block = self.job.pattern.chooser(columns, held, options.block)
            solved.append(
                sparsegpt(
                    rows[part],
                    hessian[part],
                    choose,
                    width=width,
                    block=block,
                    damping=options.damping,
                    name=weight.tensor,
                )
            )
        made, zeros = zip(*solved, strict=True)
        return torch.cat(made), torch.cat(zeros)


def _by_node(weights: Iterable[Weight]) -> dict[fx.Node, tuple[Weight, Reader]]:
    return {reader.node: (weight, reader) for weight in weights for reader in weight.readers}


def _same(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and torch.equal(one, other)


def _nothing(declined: Iterable[Declined]) -> UsageError:
    left = [each for each in declined if each.reason != "it is not selected"]
    return UsageError(
        "there is no weight to prune",
        reason="; ".join(f"{each.node}: {each.reason}" for each in left[:3]),
        hint="select other layers, or take this pass out",
    )
