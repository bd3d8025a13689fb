"""Put merged experts in place, and a map from the router's numbers to theirs."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxcompress.errors import PassError
from fxcompress.nn import Experts
from passes._paths import scope_beside
from passes.moe._merge.align import permuted
from passes.moe._routing import find_mixtures

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter
    from passes.moe.merge_experts import Group, Merged, MergeExpertsDecision

__all__ = ["check_merged", "insert", "merged"]

_TENSORS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")


def insert(rewriter: GraphRewriter, decision: MergeExpertsDecision) -> None:
    """Give each mixture its merged experts; where nothing is merged it stays as it is."""
    wanted = {each.path: each for each in decision.mixtures if len(each.groups) < each.before}
    for mixture in find_mixtures(rewriter.program):
        entry = wanted.get(mixture.path)
        if entry is None:
            continue
        tensors = merged(mixture.experts, entry.groups, decision.arrays.get(entry.path))
        made = Experts.of(**tensors, **mixture.experts.settings)
        made.requires_grad_(mixture.experts.up.requires_grad)
        rewriter.set_module(entry.path, made)
        name = rewriter.fresh_path(f"{entry.path}_map")
        rewriter.add_tensor(name, _map(entry), trainable=False)
        for call in mixture.calls:
            where: dict[str, Any] = {"before": call.node, "scope": scope_beside(call.node)}
            held = rewriter.get_attr(name, **where)
            looked_up = rewriter.call_function(operator.getitem, (held, call.indices), **where)
            rewriter.set_args(call.node, (call.x, call.weights, looked_up), {})


def _map(entry: Merged) -> Tensor:
    """Return the new number of each expert."""
    found = torch.empty(entry.before, dtype=torch.int64)
    for number, group in enumerate(entry.groups):
        found[list(group.experts)] = number
    return found


def merged(experts: Experts, groups: Sequence[Group], order: Any) -> Mapping[str, Any]:
    """Return the tensors of merged experts, by name.

    Args:
        experts: What is merged.
        groups: What becomes one.
        order: Which hidden unit of each expert stands in each place, `[experts, hidden]`; None for
            the order that they have.
    """
    places = None if order is None else torch.as_tensor(order)
    made: dict[str, Any] = {}
    for name in _TENSORS:
        tensor = getattr(experts, name)
        if tensor is None:
            continue
        held = tensor.detach()
        rows = []
        for group in groups:
            total = torch.zeros_like(held[0], dtype=torch.float64)
            for expert, share in zip(group.experts, group.shares, strict=True):
                own = held[expert]
                if places is not None and not own.is_meta:
                    own = permuted(own, name, places[expert].to(own.device))
                total += share * own.double()
            only = len(group.experts) == 1
            rows.append(held[group.experts[0]] if only else total.to(held.dtype))
        made[name] = torch.stack(rows)
    return made


def check_merged(after: Program, decision: MergeExpertsDecision) -> None:
    """Check that each mixture has as many experts as groups.

    Raises:
        PassError: One has not.
    """
    there = {each.path: each.experts.experts for each in find_mixtures(after)}
    for entry in decision.mixtures:
        if there.get(entry.path) != len(entry.groups):
            raise PassError(
                f"{entry.path} has {there.get(entry.path)} experts, not {len(entry.groups)}",
                where=entry.path,
            )
