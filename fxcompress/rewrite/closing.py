"""Close attention that was written out to be tapped: what is emitted runs it as one op again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, cast

import torch
from torch import fx, nn
from torch.nn import functional as F

from fxcompress.ir.ops import bind, module_of, op_name
from fxcompress.ir.program import Program
from fxcompress.nn import Tap, TopTokens
from fxcompress.rewrite.rewriter import GraphRewriter
from fxcompress.rewrite.taps import taps_of

__all__ = ["DROPS", "as_emitted"]

DROPS: Final = "drops"
"""The folder of modules that act while training alone: in evaluation, each is its last input."""

_OPEN: Final = object()
"""What stands for a mask that is not in the form that `open_attention` writes."""


def as_emitted(program: Program) -> Program:
    """Return a Program without its taps, attention that was written out for them closed.

    Drops of blocks and gradients of routers that a pass put in are gone, too: they act while
    training alone, as do routers whose choice a predictor makes. Outputs in evaluation mode stay,
    up to rounding: dropout on the probabilities is gone. What was changed since, by a quantizer in
    between say, stays written out.
    """
    if not taps_of(program) and not any(map(_is_drop, program.nodes)):
        return program
    rewriter = GraphRewriter(program)
    for node in [each for each in rewriter.graph.nodes if _is_drop(each)]:
        read = node.all_input_nodes
        rewriter.replace_uses(node, read[-1])
        rewriter.remove(node)
        for each in read[:-1]:
            _clear(rewriter, each)
    opened = []
    for node in taps_of(rewriter.program).values():
        source = node.all_input_nodes[0]
        rewriter.replace_uses(node, source)
        rewriter.remove(node)
        if cast(Tap, module_of(node)).opened:
            opened.append(source)
        else:
            _clear(rewriter, source)
    for probabilities in opened:
        _close(rewriter, probabilities)
    for node in [each for each in rewriter.graph.nodes if _is_predicted(each)]:
        scores, likely = node.args
        rewriter.set_args(node, (likely, likely))
        _clear(rewriter, cast(fx.Node, scores))
    return rewriter.finish()


def _is_predicted(node: fx.Node) -> bool:
    """Whether a node chooses tokens by another value than while training."""
    return op_name(node) == "top_tokens" and cast(TopTokens, module_of(node)).causal


def _clear(rewriter: GraphRewriter, node: fx.Node) -> None:
    """Remove a node that nothing reads, and what was only there for it."""
    for unread in _unread(node):
        rewriter.remove(unread)


def _is_drop(node: fx.Node) -> bool:
    return node.op == "call_module" and str(node.target).startswith(f"{DROPS}.")


def _close(rewriter: GraphRewriter, probabilities: fx.Node) -> None:
    softmax = probabilities
    if op_name(softmax) == "masked_fill":
        softmax = softmax.all_input_nodes[0]
    mixed = _mixed_by(probabilities)
    if op_name(softmax) != "softmax" or mixed is None or bind(softmax).get("dim") != -1:
        return
    product, mask, causal = _masked(softmax.all_input_nodes[0])
    query, key, scale = _product(product)
    if mask is _OPEN or query is None or key is None:
        return
    value = mixed.all_input_nodes[1]
    given: dict[str, Any] = {"attn_mask": mask, "is_causal": causal, "scale": scale}
    given = {name: each for name, each in given.items() if each not in (None, False)}
    closed = rewriter.call_function(
        F.scaled_dot_product_attention, (query, key, value), given, before=mixed
    )
    rewriter.replace_uses(mixed, closed)
    _clear(rewriter, mixed)


def _mixed_by(probabilities: fx.Node) -> fx.Node | None:
    """Return the product of the probabilities, dropout left out, and the values."""
    node = probabilities
    for _ in range(2):
        users = list(node.users)
        if len(users) != 1:
            return None
        if op_name(users[0]) == "matmul":
            operands = users[0].all_input_nodes
            return users[0] if len(operands) == 2 and operands[0] is node else None
        if op_name(users[0]) != "dropout" and not isinstance(_module(users[0]), nn.Dropout):
            return None
        node = users[0]
    return None


def _masked(scores: fx.Node) -> tuple[fx.Node, Any, bool]:
    """Return the product below a mask, the mask, and whether it is the triangle."""
    if op_name(scores) == "add":
        product, mask = scores.all_input_nodes
        if op_name(mask) == "masked_fill":
            return product, mask.all_input_nodes[0], False
        return product, _OPEN, False
    if op_name(scores) != "masked_fill":
        return scores, None, False
    product, unseen = scores.all_input_nodes[:2]
    if op_name(unseen) == "logical_and":
        unseen = unseen.all_input_nodes[0]
    if op_name(unseen) != "logical_not":
        return product, _OPEN, False
    mask = unseen.all_input_nodes[0]
    if op_name(mask) != "tril":
        return product, mask, False
    made = mask.all_input_nodes[0]
    own = made.op == "call_method" and made.target == "new_ones" and made.args[0] is product
    return product, None if own else mask, own


def _product(product: fx.Node) -> tuple[fx.Node | None, fx.Node | None, Any]:
    """Return query, key and scale of q · scale · kᵀ; nothing where it has another form."""
    nothing = None, None, None
    if op_name(product) != "matmul" or len(product.all_input_nodes) != 2:
        return nothing
    scaled, turned = product.all_input_nodes
    scale: Any = scaled.args[1] if op_name(scaled) == "mul" and len(scaled.args) == 2 else None
    if not isinstance(scale, float) or op_name(turned) != "transpose":
        return nothing
    rank = cast(torch.Tensor, turned.meta["val"]).dim()
    given = bind(turned)
    if {given["dim0"] % rank, given["dim1"] % rank} != {rank - 1, rank - 2}:
        return nothing
    return scaled.all_input_nodes[0], turned.all_input_nodes[0], scale


def _unread(node: fx.Node) -> Iterator[fx.Node]:
    """Yield a node that nothing reads, and then those below it that nothing reads any more."""
    pending = [node]
    while pending:
        found = pending.pop()
        if found.users or found.op in ("placeholder", "output"):
            continue
        below = list(dict.fromkeys(found.all_input_nodes))
        yield found
        pending.extend(each for each in below if each not in pending)


def _module(node: fx.Node) -> nn.Module | None:
    return module_of(node) if node.op == "call_module" else None
