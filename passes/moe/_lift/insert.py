"""Put the leaf in the place of a mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from fxcompress.errors import PassError
from fxcompress.nn import Experts
from passes.moe._lift.arguments import arguments_of
from passes.moe._lift.feeds import Feed, Part, part_of
from passes.moe._lift.find import tensor_names
from passes.moe._lift.found import Found
from passes.moe._lift.products import Product, Tensor3

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter

__all__ = ["experts_of", "insert", "path_of"]


def path_of(program: Program, found: Found) -> str:
    """Return where the leaf goes: the module that holds the experts, or a new one in it."""
    names = _names(found)
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    path = ".".join(same[0] for same in takewhile(lambda each: len(set(each)) == 1, parts))
    prefix, mine = f"{path}." if path else "", set(names)
    if path and not any(n.startswith(prefix) and n not in mine for n in program.state()):
        return path
    taken = {name for name, _ in program.module.named_modules()} | set(program.state())
    taken -= {f"{prefix}experts"} if _is_emptied(program, f"{prefix}experts", mine) else set()
    numbered = (f"{prefix}experts{f'_{i}' if i > 1 else ''}" for i in count(1))
    return next(each for each in numbered if each not in taken)


def _is_emptied(program: Program, path: str, gone: set[str]) -> bool:
    """Whether a module holds nothing but tensors that will be gone."""
    held = [name for name in program.state() if name.startswith(f"{path}.")]
    return bool(held) and all(name in gone for name in held)


def insert(rewriter: GraphRewriter, found: Found, path: str) -> fx.Node:
    """Put the leaf in the place of a mixture; return its node.

    Args:
        rewriter: What to change.
        found: Nodes of the rewriter's own graph.
        path: Where the leaf goes.
    """
    leaf = experts_of(rewriter, found)
    scope = tuple(s for s in found.output.meta.get("scope", ()) if f"{path}.".startswith(s[0]))
    given = arguments_of(rewriter, found)
    names = _names(found)
    own = leaf if rewriter.tree.find(path) is None else None
    args = (given.x, given.weights, given.indices)
    node = rewriter.call_module(path, own, args, after=found.output)
    node.meta["scope"] = scope
    made = rewriter.call_function(torch.sum, (node, -2), after=node) if given.summed else node
    rewriter.replace_uses(found.output, made)
    _clear(rewriter, found.output)
    if rewriter.tree.find(path) is not leaf:
        rewriter.set_module(path, leaf)
    for name in names:
        if rewriter.tree.tensor(name) is not None:
            rewriter.remove_tensor(name)
    return node


def _clear(rewriter: GraphRewriter, node: fx.Node) -> None:
    """Remove a node and what only it has read."""
    stack = [node]
    while stack:
        each = stack.pop()
        if each._erased or each.users or each.op in ("placeholder", "output"):
            continue
        sources = each.all_input_nodes
        rewriter.remove(each)
        stack.extend(sources)


def experts_of(rewriter: GraphRewriter, found: Found) -> Experts:
    """Return the leaf with the matrices of a mixture, in the leaf's layout."""
    first = found.feeds[0]
    sides: dict[str, list[tuple[Product, Part]]] = {}
    sides["down"] = [(feed.down, "all") for feed in found.feeds]
    sides["up"] = [feed.up for feed in found.feeds]
    if first.gate is not None:
        sides["gate"] = [_gate(feed) for feed in found.feeds]
    given: dict[str, Any] = {
        "activation": first.activation,
        "limit": first.limit,
        "dropout": first.dropout,
    }
    for name, products in sides.items():
        made: Any = torch.stack if len(products) > 1 else _only
        given[name] = _parameter(
            rewriter, made([_matrix(rewriter, p, part) for p, part in products]), products
        )
        if products[0][0].bias is not None:
            biases = made([_bias(rewriter, p, part) for p, part in products])
            given[f"{name}_bias"] = _parameter(rewriter, biases, products)
    return Experts.of(**given)


def _gate(feed: Feed) -> tuple[Product, Part]:
    assert feed.gate is not None
    return feed.gate


def _only(tensors: Sequence[Tensor]) -> Tensor:
    (tensor,) = tensors
    return tensor if tensor.dim() > 1 else tensor.unsqueeze(0)


def _parameter(
    rewriter: GraphRewriter, value: Tensor, products: list[tuple[Product, Part]]
) -> nn.Parameter:
    original = rewriter.tree.tensor(products[0][0].weight.name)
    trained = original is not None and original.requires_grad
    return nn.Parameter(value.contiguous(), requires_grad=trained)


def _matrix(rewriter: GraphRewriter, product: Product, part: Part) -> Tensor:
    """Return the part of a product's matrices, `[…, out, in]`."""
    stored = _stored(rewriter, product.weight)
    stored = stored.transpose(-1, -2) if product.weight.flipped else stored
    return part_of(stored, part, -2)


def _bias(rewriter: GraphRewriter, product: Product, part: Part) -> Tensor:
    """Return the part of a product's biases, `[…, out]`."""
    if product.bias is None:
        raise PassError(f"{product.weight.name} has no bias, where another expert's has one")
    stored = _stored(rewriter, product.bias)
    if product.kind == "all" and stored.dim() == 3:
        stored = stored.squeeze(1)
    return part_of(stored, part, -1)


def _stored(rewriter: GraphRewriter, tensor: Tensor3) -> Tensor:
    found = rewriter.get_tensor(tensor.name)
    return found if tensor.index is None else found[tensor.index]


def _names(found: Found) -> list[str]:
    return sorted(tensor_names(product for feed in found.feeds for product in feed.products))
