"""The decision of a pass that puts zeros into weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxcompress.errors import UsageError
from passes._paths import free_path, path_beside
from passes.prune._sparsity.candidates import Candidates
from passes.prune._sparsity.decision import AxisOrder, SparseWeight, SparsityDecision
from passes.prune._sparsity.find_orders import find_orders
from passes.prune._sparsity.masks import pack, pruned_weight
from passes.prune._sparsity.patterns import NOfM, Pattern
from passes.prune._sparsity.zeros import Found, find

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite.edits import Declined
    from passes._layers.weights import Weight
    from passes.prune._sparsity.options import SparsityOptions

__all__ = ["decide"]


def decide(
    program: Program,
    options: SparsityOptions,
    pattern: Pattern,
    context: Context,
    *,
    escapes: int | None = None,
) -> SparsityDecision:
    """Return the zeros of every selected weight; without them where only a run can know.

    Args:
        program: What is pruned.
        options: Which weights, and by what.
        pattern: Where zeros may go.
        context: Holds the data.
        escapes: Search better orders of channels, for N:M, with so many escapes; None for none.

    Raises:
        SelectorError: The selection fits no layer, or not as many as expected.
        UsageError: No weight can be pruned, or all of one would be.
        DataError: The calibration split is missing or too small.
        NumericsError: A NaN or an infinity in weights or in what they are multiplied with.
    """
    candidates = Candidates.of(program, options, pattern)
    if not candidates.weights:
        raise _nothing(candidates.declined)
    pending = _pending(candidates, context, ordering=escapes is not None)
    if pending:
        paths = _mask_paths(candidates)
        entries = [_entry(candidates, each, paths, None) for each in candidates.weights]
        return _decision(candidates, entries, {}, pending=pending)
    orders: tuple[AxisOrder, ...] = ()
    arrays: dict[str, Any] = {}
    if escapes is not None and isinstance(pattern, NOfM):
        orders, ordered = find_orders(candidates, pattern, escapes, context)
        arrays.update(ordered)
    entries = _pruned(candidates, find(candidates, context), arrays)
    if not entries:
        raise _nothing(candidates.declined)
    return _decision(candidates, entries, arrays, orders=orders)


def _pruned(candidates: Candidates, found: Found, arrays: dict[str, Any]) -> list[SparseWeight]:
    """Return an entry for each weight that changes, and add its arrays; decline the others.

    Raises:
        UsageError: All of a weight would be zero.
    """
    paths = _mask_paths(candidates)
    entries: list[SparseWeight] = []
    for weight in candidates.weights:
        zeros, rows = found.zeros[weight.tensor], found.rows.get(weight.tensor)
        value = candidates.value(weight)
        made = pruned_weight(weight.form, value, zeros, rows)
        reason = _unchanged(candidates, weight, zeros, made)
        if reason is not None:
            candidates.decline(weight, reason)
            continue
        entries.append(_entry(candidates, weight, paths, zeros))
        mask = weight.form.weight(zeros, value)
        arrays[f"{weight.tensor}.zeros"] = pack(mask)
        if rows is not None:
            arrays[f"{weight.tensor}.kept"] = made[~mask]
    return entries


def _pending(candidates: Candidates, context: Context, *, ordering: bool) -> tuple[str, ...]:
    """Return what cannot be known now, per weight."""
    when = ""
    if candidates.options.criterion != "magnitude" and context.planning:
        when = f"known after calibration ({candidates.options.calibration} samples)"
    elif ordering and context.planning:
        when = "known after the search for orders of channels"
    elif any(candidates.value(each).is_meta for each in candidates.weights):
        when = "known once the weights have values"
    return tuple(f"{each.tensor}: zeros {when}" for each in candidates.weights) if when else ()


def _unchanged(candidates: Candidates, weight: Weight, zeros: Tensor, made: Tensor) -> str | None:
    """Return why a weight stays as it is, or None.

    Raises:
        UsageError: All of it would be zero.
    """
    if bool(zeros.all()):
        raise UsageError(
            f"every entry of {weight.tensor} would become zero",
            reason="its layer would give nothing but its bias",
            hint="lower the ratio or the threshold, exclude the layer, or take `scope: layer`",
            where=weight.tensor,
        )
    if not bool(zeros.any()):
        return "none of its weights is pruned: the ratio or the threshold is too small"
    fixed = candidates.fixed(weight)
    if candidates.options.mode == "keep":
        masked_so = fixed is not None and torch.equal(fixed, zeros)
    else:
        masked_so = fixed is None
    if masked_so and torch.equal(made, candidates.value(weight)):
        return "it is as sparse already"
    return None


def _mask_paths(candidates: Candidates) -> dict[str, str]:
    """Return tensor -> where its mask is or will be."""
    taken = {name for name, _ in candidates.scratch.module.named_modules()}
    taken |= set(candidates.scratch.program.state())
    paths: dict[str, str] = {}
    for weight in candidates.weights:
        if weight.mask is None and candidates.options.mode == "keep":
            owner = next((r.node for r in weight.readers if r.node.op == "call_module"), None)
            # Beside the layer, which must stay without children.
            named = weight.tensor if owner is None else f"{owner.target}_weight"
            paths[weight.tensor] = free_path(path_beside(named, "_mask"), taken)
            taken.add(paths[weight.tensor])
        elif weight.mask is not None:
            paths[weight.tensor] = weight.mask
    return paths


def _entry(
    candidates: Candidates, weight: Weight, paths: Mapping[str, str], zeros: Tensor | None
) -> SparseWeight:
    return SparseWeight(
        tensor=weight.tensor,
        layers=tuple(candidates.ids[each.node] for each in weight.readers),
        form=weight.form,
        entries=candidates.value(weight).numel(),
        zeros=None if zeros is None else int(zeros.sum()),
        mask=paths.get(weight.tensor),
        masked=weight.mask is not None,
    )


def _decision(
    candidates: Candidates,
    entries: Sequence[SparseWeight],
    arrays: Mapping[str, Any],
    *,
    pending: tuple[str, ...] = (),
    orders: tuple[AxisOrder, ...] = (),
) -> SparsityDecision:
    zeros = sum(each.zeros or 0 for each in entries)
    sparsity = None if pending else round(zeros / sum(each.entries for each in entries), 6)
    pattern = candidates.pattern
    return SparsityDecision(
        criterion=candidates.options.criterion,
        mode=candidates.options.mode,
        weights=tuple(entries),
        declined=tuple(candidates.declined),
        pattern=(pattern.n, pattern.m) if isinstance(pattern, NOfM) else None,
        sparsity=sparsity,
        orders=orders,
        arrays=dict(arrays),
        pending=pending,
    )


def _nothing(declined: Iterable[Declined]) -> UsageError:
    left = [each for each in declined if each.reason != "it is not selected"]
    return UsageError(
        "there is no weight to prune",
        reason="; ".join(f"{each.node}: {each.reason}" for each in left[:3]),
        hint="select other layers, or take this pass out",
    )
