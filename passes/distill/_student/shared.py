"""Blocks that share their tensors: the second calls the modules of the first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import fx

from fxcompress.errors import PassError, UsageError
from fxcompress.ir.modules import describe, is_stock
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import op_name
from passes.depth._blocks import Region

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter
    from passes.distill.student import Layer

__all__ = ["check_alike", "check_shared", "share"]


def check_alike(program: Program, layers: Iterable[Layer], regions: Mapping[str, Region]) -> None:
    """Check that blocks that are to share tensors do the same with tensors of the same shapes.

    Raises:
        UsageError: Two do not; says where they differ.
    """
    every = list(layers)
    ids = node_ids(program)
    for layer in every:
        first = every[layer.shares]
        if first is layer:
            continue
        mine, its = _states(program, regions[layer.path]), _states(program, regions[first.path])
        for one, other in zip(its, mine, strict=False):
            if _shape(program, one) != _shape(program, other) or _within(one, first.path) != (
                _within(other, layer.path)
            ):
                raise UsageError(
                    f"{layer.path} cannot share the tensors of {first.path}",
                    reason=f"{ids[other]} is not like {ids[one]}",
                    where=layer.path,
                )
        if len(mine) != len(its):
            raise UsageError(
                f"{layer.path} cannot share the tensors of {first.path}",
                reason=f"it has {len(mine)} layers and parameters, the other {len(its)}",
                where=layer.path,
            )


def share(rewriter: GraphRewriter, layers: Iterable[Layer], how: str) -> None:
    """Let each block of a group use the tensors of the first, or all of them the mean."""
    every = list(layers)
    groups: dict[int, list[Layer]] = {}
    for layer in every:
        groups.setdefault(layer.shares, []).append(layer)
    for place, group in groups.items():
        if len(group) == 1:
            continue
        first = every[place].path
        if how == "mean":
            _average(rewriter, first, [each.path for each in group])
        for layer in group:
            if layer.path != first:
                _redirect(rewriter, layer.path, first)


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


def _average(rewriter: GraphRewriter, first: str, paths: list[str]) -> None:
    """Give the first block the mean of all blocks' parameters and statistics."""
    names = [name for name in rewriter.tree.state() if name.startswith(f"{first}.")]
    for name in names:
        same = [f"{path}.{name.removeprefix(f'{first}.')}" for path in paths]
        tensors = [rewriter.get_tensor(each) for each in same]
        if tensors[0].is_floating_point():
            total = torch.stack([tensor.double() for tensor in tensors]).mean(0)
            rewriter.set_tensor(name, total.to(tensors[0].dtype), tied=True)


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


def check_shared(after: Program, layers: Iterable[Layer]) -> None:
    """Check that no tensor of a block that uses another's is left.

    Raises:
        PassError: One is.
    """
    for layer in layers:
        if layer.shares != layer.new:
            left = [name for name in after.state() if name.startswith(f"{layer.path}.")]
            if left:
                raise PassError(f"{left[0]} is left of {layer.path}", where=layer.path)
