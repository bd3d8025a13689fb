"""Early exits of a Program: find them, and cut the model off at one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, cast

import torch
from torch import fx

from fxcompress.errors import PassError, UsageError
from fxcompress.ir.ops import module_of, op_name
from fxcompress.ir.program import Program
from fxcompress.nn import Exit
from fxcompress.rewrite.rewriter import GraphRewriter
from fxcompress.rewrite.taps import taps_of

__all__ = ["EXITS", "Early", "at_exit", "early_exits"]

EXITS: Final = "exits"
"""The folder of the exits' heads."""


@dataclass(frozen=True)
class Early:
    """An early exit.

    Attributes:
        name: Its name, `exit_0` and so on.
        logits: The node that its head makes.
        choice: The node that chooses between it and what comes later; None where it is a tap yet.
        tap: The tap on its logits; None where thresholds were set.
    """

    name: str
    logits: fx.Node
    choice: fx.Node | None = None
    tap: fx.Node | None = None


def early_exits(program: Program) -> tuple[Early, ...]:
    """Return the exits of a Program, the earliest first; none where it has none."""
    chosen = [node for node in program.nodes if op_name(node) == "exit"]
    if chosen:
        # The choice of the earliest exit reads those of the later ones, and comes last.
        return tuple(
            Early(cast(Exit, module_of(node)).name, node.all_input_nodes[0], choice=node)
            for node in reversed(chosen)
        )
    return tuple(
        Early(name, tap.all_input_nodes[0], tap=tap)
        for name, tap in taps_of(program).items()
        if _is_head(tap.all_input_nodes[0])
    )


def _is_head(node: fx.Node) -> bool:
    return any(path.startswith(f"{EXITS}.") for path, _ in node.meta.get("scope", ()))


def at_exit(program: Program, name: str, place: int = 0) -> Program:
    """Return the model that always stops at an exit: its logits are the main output.

    Other outputs that are computed after it stay, and keep what they need.

    Args:
        program: One with exits, with or without thresholds.
        name: The exit; `last` for the model without early exits.
        place: Which leaf of the output the logits are, where no thresholds say so yet.

    Raises:
        UsageError: There is no such exit.
        PassError: The logits have another type than the output.
    """
    exits = {each.name: each for each in early_exits(program)}
    if name != "last" and name not in exits:
        raise UsageError(
            f"there is no exit {name}",
            reason=f"there are {', '.join([*exits, 'last'])}" if exits else "the model has none",
            hint="" if exits else "put `use: depth.early_exit` before it",
        )
    rewriter = GraphRewriter(program)
    own = {each.name: each for each in early_exits(rewriter.program)}
    for each in reversed(own.values()):
        if each.choice is not None:
            early, late = each.choice.all_input_nodes
            rewriter.replace_uses(each.choice, early if each.name == name else late)
            rewriter.remove(each.choice)
        elif each.tap is not None:
            rewriter.remove(each.tap)
    if name != "last" and own[name].choice is None:
        _answer(rewriter, own[name].logits, place)
    return rewriter.finish()


def _answer(rewriter: GraphRewriter, logits: fx.Node, place: int) -> None:
    (output,) = rewriter.graph.find_nodes(op="output")
    leaves = list(cast(Sequence[fx.Node], output.args[0]))
    ours, theirs = logits.meta["val"], leaves[place].meta["val"]
    if ours.dtype != theirs.dtype or not _like(ours, theirs):
        raise PassError(f"{rewriter.id(logits)} cannot stand for the output")
    leaves[place] = logits
    rewriter.set_args(output, (tuple(leaves),))


def _like(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return tuple(map(str, ours.shape)) == tuple(map(str, theirs.shape))
