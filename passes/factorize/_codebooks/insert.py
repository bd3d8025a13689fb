"""Let layers read their weights through codebooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from fxcompress.errors import PassError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import op_name
from fxcompress.nn import Codebook
from passes._layers.quantizer import insert_quantizer, weight_node

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter
    from passes.factorize.share_weights import ShareWeightsDecision

__all__ = ["check_shared", "insert"]


def insert(rewriter: GraphRewriter, decision: ShareWeightsDecision) -> None:
    """Insert the codebooks, let weights be the values they belong to, and train those alone."""
    for declined in decision.declined:
        rewriter.decline(declined.node, declined.reason, declined.because_of)
    state = rewriter.program.state()
    for entry in decision.weights:
        weight = state[entry.tensor]
        book = Codebook(entry.entries, groups=entry.groups, axis=entry.axis, rows=entry.rows)
        if entry.path in decision.arrays:
            book.fit(torch.as_tensor(decision.arrays[entry.path]))
        book.codebook.requires_grad_(decision.train and weight.requires_grad)
        book = book.to(rewriter.device)
        readers = [rewriter.node(layer) for layer in entry.layers]
        insert_quantizer(rewriter, book, entry.path, entry.tensor, readers)
        if entry.path in decision.arrays:
            with torch.no_grad():
                made = book(weight.detach())
            rewriter.set_tensor(entry.tensor, made, tied=True)
        if weight.requires_grad:
            rewriter.set_trainable(entry.tensor, False)


def check_shared(after: Program, decision: ShareWeightsDecision) -> None:
    """Check that every layer reads its weight through its codebook, as one of its entries.

    Raises:
        PassError: One does not.
    """
    nodes = {name: node for node, name in node_ids(after).items()}
    state = after.state()
    for entry in decision.weights:
        for layer in entry.layers:
            read = weight_node(nodes[layer]) if layer in nodes else None
            if not isinstance(read, fx.Node) or op_name(read) != "codebook":
                raise PassError(
                    f"{layer} does not read its weight through a codebook",
                    reason="every layer of the decision must",
                    where=layer,
                )
        value = state[entry.tensor].detach()
        book = after.module.get_submodule(entry.path)
        assert isinstance(book, Codebook), "the op is a codebook's"
        if value.is_meta or entry.path not in decision.arrays:
            continue
        if not torch.equal(book.dequantize(book.indices(value), value.dtype), value):
            raise PassError(f"{entry.tensor} holds other values than its codebook")
