"""Let what reads a block read the block's input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from passes.depth._sizes import rebuild

if TYPE_CHECKING:
    from fxcompress.rewrite import GraphRewriter
    from passes.depth.skip_blocks import Block

__all__ = ["skip"]


def skip(rewriter: GraphRewriter, blocks: Sequence[Block]) -> None:
    """Put the identity in the place of blocks, given in graph order."""
    # Last first: the readers of a block include the skipped blocks after it.
    for block in reversed(blocks):
        entry = rewriter.node(block.entry)
        for size in map(rewriter.node, block.sizes):
            rewriter.replace_uses(size, rebuild(rewriter, size, entry))
        rewriter.replace_uses(rewriter.node(block.exit), entry)
