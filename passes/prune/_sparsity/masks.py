"""Zeros in weights: as bits of a decision, in the graph, and checked afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fxcompress.errors import PassError
from fxcompress.nn import Mask, take_weight_as_operand
from fxcompress.rewrite import burn_masks
from passes._layers.form import Form
from passes._paths import scope_beside
from passes.prune._sparsity.orders import apply_orders, ordered_tensors

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter
    from passes.prune._sparsity.decision import SparseWeight, SparsityDecision

__all__ = ["check_sparse", "pack", "pruned_weight", "set_sparse", "unpack"]


def pack(mask: Tensor) -> Tensor:
    """Return booleans as bits, eight to a byte, in the order of the entries."""
    bits = torch.zeros(math.ceil(mask.numel() / 8) * 8, dtype=torch.uint8)
    bits[: mask.numel()] = mask.cpu().reshape(-1)
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)
    return (bits.reshape(-1, 8) * weights).sum(1, dtype=torch.uint8)


def unpack(bits: Any, shape: torch.Size) -> Tensor:
    """Return the booleans that `pack` was given."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8)
    flat = (torch.as_tensor(bits).unsqueeze(1) >> shifts) & 1
    return flat.reshape(-1)[: shape.numel()].reshape(shape).bool()


def pruned_weight(form: Form, weight: Tensor, zeros: Tensor, rows: Tensor | None) -> Tensor:
    """Return `weight` with zeros, in its own dtype.

    Args:
        form: Of the weight.
        weight: As it was.
        zeros: `[groups, out, columns]`.
        rows: What the kept entries become, likewise; None leaves them as they are.
    """
    kept = weight if rows is None else form.weight(rows, weight).to(weight.dtype)
    return kept.masked_fill(form.weight(zeros, weight), 0.0)


def set_sparse(rewriter: GraphRewriter, decision: SparsityDecision) -> None:
    """Write the zeros of a decision into weights, and put masks in or take them out."""
    for declined in decision.declined:
        rewriter.decline(declined.node, declined.reason, declined.because_of)
    apply_orders(rewriter, decision.orders, decision.arrays)
    for entry in decision.weights:
        weight = rewriter.get_tensor(entry.tensor)
        zeros = _zeros(entry, decision.arrays, weight)
        made = _sparse(entry, decision.arrays, weight, zeros)
        rewriter.set_tensor(entry.tensor, made, tied=True)
        if decision.mode == "keep":
            _put_mask(rewriter, entry, ~zeros)
        elif entry.masked and entry.mask is not None:
            burn_masks(rewriter, [entry.mask])


def _zeros(entry: SparseWeight, arrays: Mapping[str, Any], weight: Tensor) -> Tensor:
    bits = arrays.get(f"{entry.tensor}.zeros")
    if bits is None:
        return torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    return unpack(bits, weight.shape).to(weight.device)


def _sparse(
    entry: SparseWeight, arrays: Mapping[str, Any], weight: Tensor, zeros: Tensor
) -> Tensor:
    made = weight.masked_fill(zeros, 0.0)
    kept = arrays.get(f"{entry.tensor}.kept")
    if kept is not None:
        made[~zeros] = torch.as_tensor(kept).to(made)
    return made


def _put_mask(rewriter: GraphRewriter, entry: SparseWeight, keep: Tensor) -> None:
    path = cast(str, entry.mask)
    if entry.masked:
        rewriter.set_tensor(f"{path}.mask", keep)
        return
    module: Mask | None = Mask(keep.shape, device="meta")
    cast(Mask, module).mask = keep
    names = rewriter.tied(entry.tensor)
    sources = [each for n in names for each in rewriter.graph.find_nodes(op="get_attr", target=n)]
    for source in sources:
        mask = rewriter.call_module(path, module, (source,), after=source)
        rewriter.replace_uses(source, mask)
        module = None
    layers = [rewriter.node(layer) for layer in entry.layers]
    owners = [each for each in layers if each.op == "call_module" and len(each.args) == 1]
    if not owners:
        return
    scope = scope_beside(owners[0])
    weight = rewriter.get_attr(entry.tensor, before=owners[0], scope=scope)
    mask = rewriter.call_module(path, module, (weight,), after=weight, scope=scope)
    for layer in dict.fromkeys(str(each.target) for each in owners):
        rewriter.set_module(layer, take_weight_as_operand(rewriter.get_module(layer)))
    for owner in owners:
        rewriter.set_args(owner, (owner.args[0], mask), {})


def check_sparse(before: Program, after: Program, decision: SparsityDecision) -> None:
    """Check that the zeros are where they were decided, and that nothing else changed.

    Raises:
        PassError: They are not, or something did.
    """
    new = after.state()
    ordered = ordered_tensors(before, decision.orders, decision.arrays)
    # A tied tensor is ordered under its canonical name.
    old = {
        name: ordered.get(before.ties.get(name, name), tensor)
        for name, tensor in before.state().items()
    }
    touched = {entry.tensor for entry in decision.weights}
    touched |= {alias for alias, name in before.ties.items() if name in touched}
    touched |= {f"{entry.mask}.mask" for entry in decision.weights if entry.masked}
    for name, tensor in old.items():
        same = name in touched or new.get(name) is tensor
        if not same and not torch.equal(new[name], tensor):
            raise PassError(f"{name} changed, and it is not pruned", where=name)
    if decision.pending:
        return
    for entry in decision.weights:
        _check_entry(entry, decision, old[entry.tensor], after)


def _check_entry(
    entry: SparseWeight, decision: SparsityDecision, old: Tensor, after: Program
) -> None:
    weight = after.state()[entry.tensor].detach()
    zeros = unpack(decision.arrays[f"{entry.tensor}.zeros"], weight.shape).to(weight.device)
    problem = None
    if int(zeros.sum()) != entry.zeros or bool(weight[zeros].count_nonzero()):
        problem = f"it does not hold {entry.zeros} zeros where they were decided"
    elif f"{entry.tensor}.kept" not in decision.arrays and not torch.equal(
        weight[~zeros], old.detach()[~zeros]
    ):
        problem = "weights that are kept changed"
    elif decision.mode == "keep" and not torch.equal(after.state()[f"{entry.mask}.mask"], ~zeros):
        problem = f"its mask {entry.mask} has other zeros"
    elif decision.pattern is not None:
        n, m = decision.pattern
        groups = torch.unflatten(entry.form.matrices(weight), -1, (-1, m))
        if int(groups.count_nonzero(-1).max()) > n:
            problem = f"a group of {m} keeps more than {n}"
    if problem is not None:
        raise PassError(f"{entry.tensor} is not as decided", reason=problem, where=entry.tensor)
