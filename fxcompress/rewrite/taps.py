"""Taps of a Program: put one in, find them, take them out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from torch import fx

from fxcompress.errors import PassError
from fxcompress.ir.ops import is_tap, module_of
from fxcompress.ir.program import Program
from fxcompress.nn import Tap
from fxcompress.rewrite.rewriter import GraphRewriter

__all__ = ["Put", "insert_tap", "put_taps", "taps_of", "without_taps"]

FOLDER = "taps"


def taps_of(program: Program) -> dict[str, fx.Node]:
    """Return name -> tap node, in graph order."""
    return {cast(Tap, module_of(node)).name: node for node in program.nodes if is_tap(node)}


def insert_tap(rewriter: GraphRewriter, node: fx.Node, tap: Tap) -> fx.Node:
    """Let a tap read a node's value; it is in no module's scope, so no region owns it.

    Raises:
        PassError: A tap of that name is there.
    """
    known = taps_of(rewriter.program).get(tap.name)
    if known is not None:
        raise PassError(
            f"there is a tap {tap.name} already",
            reason=f"it reads {rewriter.id(known.all_input_nodes[0])}",
            hint="choose another name",
            where=tap.name,
        )
    path = rewriter.fresh_path(f"{FOLDER}.{tap.name}")
    return rewriter.call_module(path, tap, (node,), after=node, scope=())


@dataclass(frozen=True)
class Put:
    """Where a tap goes.

    Attributes:
        tap: The module.
        node: The id of the node that it reads.
        fused: Whether that node is an attention to be written out, and the tap reads its
            probabilities.
    """

    tap: Tap
    node: str
    fused: bool = False


def put_taps(rewriter: GraphRewriter, puts: Iterable[Put]) -> None:
    """Insert taps, and write out every fused attention whose probabilities one reads.

    Raises:
        PassError: A name is taken, a node is not there, or an attention cannot be written out.
    """
    from fxcompress.rewrite.attention import open_attention

    puts = list(puts)
    # What reads a fused attention's result moves to what it becomes.
    for put in (each for each in puts if not each.fused):
        insert_tap(rewriter, rewriter.node(put.node), put.tap)
    opened: dict[str, fx.Node] = {}
    for put in (each for each in puts if each.fused):
        if put.node not in opened:
            opened[put.node] = open_attention(rewriter, rewriter.node(put.node))
        insert_tap(rewriter, opened[put.node], put.tap)


def without_taps(program: Program) -> Program:
    """Return the Program without its taps; itself where there are none."""
    if not any(is_tap(node) for node in program.nodes):
        return program
    rewriter = GraphRewriter(program)
    for node in taps_of(rewriter.program).values():
        rewriter.replace_uses(node, node.all_input_nodes[0])
        rewriter.remove(node)
    return rewriter.finish()
