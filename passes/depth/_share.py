"""Blocks that share or combine their tensors: the second calls the modules of the first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import fx, nn

from fxcompress.errors import PassError, UsageError
from fxcompress.ir.modules import describe, is_stock
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import op_name
from passes.depth._blocks import Region

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter

__all__ = ["check_alike", "check_shared", "combine", "share"]


def check_alike(
    program: Program, groups: Iterable[Sequence[str]], regions: Mapping[str, Region]
) -> None:
    """Check that blocks do the same with tensors of the same shapes, none of them in common.

    Args:
        program: The model.
        groups: Paths of blocks, the one whose tensors stay first.
        regions: The blocks by path.

    Raises:
        UsageError: Two do not; says where they differ.
    """
    ids = node_ids(program)
    for first, *others in groups:
        for path in others:
            mine, its = _states(program, regions[path]), _states(program, regions[first])
            refused = f"{path} cannot share the tensors of {first}"
            for one, other in zip(its, mine, strict=False):
                if _shape(program, one) != _shape(program, other) or _within(one, first) != (
                    _within(other, path)
                ):
                    raise UsageError(
                        refused, reason=f"{ids[other]} is not like {ids[one]}", where=path
                    )
            if len(mine) != len(its):
                raise UsageError(
                    refused,
                    reason=f"it has {len(mine)} layers and parameters, the other {len(its)}",
                    where=path,
                )


def share(rewriter: GraphRewriter, groups: Iterable[Sequence[str]], how: str) -> None:
    """Let the blocks of each group use the tensors of the first, or all of them the `mean`."""
    for group in groups:
        if how == "mean":
            combine(rewriter, group, [1.0 / len(group)] * len(group))
        for path in group[1:]:
            _redirect(rewriter, path, group[0])


def combine(rewriter: GraphRewriter, paths: Sequence[str], factors: Sequence[float]) -> None:
    """Give the first block Σ factor · tensor of all blocks' parameters and statistics.

    Where a factor is negative the statistics stay: a variance could end below zero.
    """
    first = paths[0]
    state = rewriter.tree.state()
    for name in [name for name in state if name.startswith(f"{first}.")]:
        if min(factors) < 0 and not isinstance(state[name], nn.Parameter):
            continue
        same = [f"{path}.{name.removeprefix(f'{first}.')}" for path in paths]
        tensors = [rewriter.get_tensor(each) for each in same]
        if tensors[0].is_floating_point():
            total = torch.zeros_like(tensors[0], dtype=torch.float64)
            for factor, tensor in zip(factors, tensors, strict=True):
                total += factor * tensor.double()
            rewriter.set_tensor(name, total.to(tensors[0].dtype), tied=True)


def _states(program: Program, region: Region) -> list[fx.Node]:
    """Return the nodes of a block that read the model's state, in graph order."""
    return [
        node
        for node in region.nodes
        if node.op in ("call_module", "get_attr") and str(node.target).startswith(f"{region.path}.")
    ]


def _within(node: fx.Node, path: str) -> str:
    return str(node.target).removeprefix(f"{path}.")


def _shape(program: Program, node: fx.Node) -> object:
    if node.op == "get_attr":
        tensor = program.state()[str(node.target)]
        return tuple(tensor.shape), tensor.dtype
    module = program.module.get_submodule(str(node.target))
    config = describe(module) if is_stock(module) else None
    shapes = {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}
    return op_name(node), config and (config.cls, dict(config.kwargs)), shapes


def _redirect(rewriter: GraphRewriter, path: str, first: str) -> None:
    """Let a block call the modules and read the tensors of another."""
    for node in list(rewriter.graph.nodes):
        target = str(node.target)
        if node.op not in ("call_module", "get_attr") or not target.startswith(f"{path}."):
            continue
        other = f"{first}.{target.removeprefix(f'{path}.')}"
        scope = tuple(node.meta.get("scope", ()))
        if node.op == "get_attr":
            made = rewriter.get_attr(other, before=node, scope=scope)
        else:
            if scope and scope[-1][0] == target:
                scope = (*scope[:-1], (other, scope[-1][1]))
            made = rewriter.call_module(
                other, None, node.args, node.kwargs, before=node, scope=scope
            )
        rewriter.replace_uses(node, made)
        rewriter.remove(node)


def check_shared(after: Program, groups: Iterable[Sequence[str]]) -> None:
    """Check that no tensor of a block that uses another's is left.

    Raises:
        PassError: One is.
    """
    state = after.state()
    for group in groups:
        for path in group[1:]:
            left = [name for name in state if name.startswith(f"{path}.")]
            if left:
                raise PassError(f"{left[0]} is left of {path}", where=path)
