"""Burn masks into the weights that they hold sparse."""

from __future__ import annotations

from collections.abc import Collection
from typing import cast

import torch
from torch import fx

from fxcompress.errors import PassError
from fxcompress.ir.ops import op_name
from fxcompress.ir.program import Program
from fxcompress.nn import Mask, own_weight
from fxcompress.rewrite.rewriter import GraphRewriter

__all__ = ["burn_masks", "masked_tensors", "without_masks"]


def masked_tensors(program: Program) -> dict[str, str]:
    """Return path of the mask -> name of the tensor that it masks, in graph order.

    Raises:
        PassError: A mask stands on something else than a parameter or buffer.
    """
    found: dict[str, str] = {}
    for node in program.nodes:
        if op_name(node) == "mask":
            source = cast(fx.Node, node.args[0])
            if source.op != "get_attr":
                raise PassError(
                    f"the mask {node.target} is not on a weight",
                    reason=f"it reads the result of {op_name(source)}",
                    where=str(node.target),
                )
            found[str(node.target)] = str(source.target)
    return found


def burn_masks(rewriter: GraphRewriter, paths: Collection[str] | None = None) -> dict[str, str]:
    """Write zeros where masks hold them, and take the masks out of the graph.

    A layer whose weight was an operand only because of its mask reads its own weight again.

    Args:
        rewriter: Of the Program.
        paths: The masks to burn in; all by default.

    Returns:
        Path of each mask that was there -> the tensor that holds its zeros now.

    Raises:
        PassError: Something reads the tensor past its mask, so zeros would change it.
    """
    masks = masked_tensors(rewriter.program)
    chosen = {path: name for path, name in masks.items() if paths is None or path in paths}
    for path, name in chosen.items():
        mask = cast(Mask, rewriter.get_module(path)).mask
        calls = rewriter.users_of_module(path)
        _check_only_masked(rewriter, path, name)
        weight = rewriter.get_tensor(name)
        rewriter.set_tensor(name, torch.where(mask, weight, 0.0), tied=True)
        readers: set[fx.Node] = set()
        for call in calls:
            readers.update(rewriter.replace_uses(call, cast(fx.Node, call.args[0])))
            rewriter.remove(call)
        for layer in dict.fromkeys(str(n.target) for n in readers if n.op == "call_module"):
            _give_weight_back(rewriter, layer)
    return chosen


def _check_only_masked(rewriter: GraphRewriter, path: str, name: str) -> None:
    for alias in rewriter.tied(name):
        sources = rewriter.graph.find_nodes(op="get_attr", target=alias)
        users = [user for source in sources for user in source.users if user.target != path]
        owners = rewriter.users_of_module(alias.rpartition(".")[0])
        users += [owner for owner in owners if len(owner.args) < 2]
        if users:
            raise PassError(
                f"the mask {path} cannot be burned into {name}",
                reason=f"{rewriter.id(users[0])} reads the tensor without the mask",
                where=path,
            )


def _give_weight_back(rewriter: GraphRewriter, layer: str) -> None:
    """Let an operand layer read its own weight, if that is what all its calls are given."""
    calls = rewriter.users_of_module(layer)
    own = rewriter.tied(f"{layer}.weight")
    for call in calls:
        weight = call.args[1] if len(call.args) == 2 else None
        if not (isinstance(weight, fx.Node) and weight.op == "get_attr" and weight.target in own):
            return
    rewriter.set_module(layer, own_weight(rewriter.get_module(layer)))
    for call in calls:
        rewriter.set_args(call, (call.args[0],), {})


def without_masks(program: Program) -> Program:
    """Return the Program with every mask burned in; itself where there is none."""
    if not any(op_name(node) == "mask" for node in program.nodes):
        return program
    rewriter = GraphRewriter(program)
    with torch.no_grad():
        burn_masks(rewriter)
    return rewriter.finish()
