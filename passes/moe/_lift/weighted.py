"""Whether the nodes around experts are the weighted sum of the chosen ones, tried out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxcompress.ir.ops import op_name
from passes.moe._lift.feeds import Feed
from passes.moe._lift.found import Weighing
from passes.moe._lift.miss import NearMiss
from passes.moe._lift.products import Product
from passes.moe._lift.range import check_range
from passes.moe._lift.regions import Region, bend
from passes.moe._lift.trial import Sizes, evaluate, needed

__all__ = ["weighed"]

_CLOSE: Final = {torch.float64: 1e-12, torch.float32: 1e-5}
_LIMITS: Final = frozenset({"lt", "le", "gt", "ge"})

_Changed = Mapping[fx.Node, tuple[Any, Any]]


@dataclass(frozen=True)
class _Values:
    """What a trial starts with.

    Attributes:
        tokens: `[…, width]`.
        order: The chosen experts, `[…, k]`.
        weights: In the shape of their node.
        share: What each expert counts, `[…, experts]`, computed from the weights.
        known: Values by node.
    """

    tokens: Tensor
    order: Tensor
    weights: Tensor
    share: Tensor
    known: Mapping[fx.Node, Tensor]


def weighed(
    region: Region,
    x: fx.Node,
    output: fx.Node,
    weighing: Weighing,
    products: Mapping[fx.Node, Product],
) -> Weighing | None:
    """Return how experts are weighed, if `output` is their weighted sum; else None.

    Args:
        region: The experts.
        x: The tokens.
        output: What may be the sum.
        weighing: What may choose and weigh.
        products: Products with parameters, by the node they end in.

    Raises:
        Miss: It nearly is, or cannot be tried.
    """
    found = _tried(region, x, output, weighing, alike=False)
    if found is None:
        return None
    if _tried(region, x, output, weighing, alike=True) is None:
        raise NearMiss(
            "an expert takes a number of tokens and no more, and no mask in the graph says which "
            "it takes",
            output,
        )
    check_range(found.indices, region.count)
    if found.kept is not None:
        _check_kept(found, region.count)
    if found.spread:
        _check_spread(found, region.count, products)
    if found.before and not all(_is_quiet(feed) for feed in region.feeds):
        raise NearMiss(
            "its tokens are weighed before its experts, and those make something of zeros", output
        )
    return found


@torch.enable_grad()
def _tried(
    region: Region, x: fx.Node, output: fx.Node, weighing: Weighing, *, alike: bool
) -> Weighing | None:
    """Try it on random tokens: expert e makes (1 + e) · (x + x · |x|).

    With `alike` all tokens choose the same experts, and no expert has a capacity of more than 1.
    """
    sizes = Sizes()
    values = _values(region, x, weighing, sizes, alike)
    if values is None:
        return None
    known = values.known
    changed = _small_limits(output, known) if alike or weighing.kept is not None else {}
    made = evaluate(output, known, region.stubs, sizes, changed)
    scale = 1.0 + torch.arange(region.count)
    tokens, share = values.tokens, values.share
    after = bend(tokens) * (share * scale).sum(-1, keepdim=True).to(tokens.dtype)
    found = replace(weighing, before=False)
    tolerance = _tolerance(made, tokens, values.weights)
    if not _close(made, after, tolerance):
        each = bend(tokens.unsqueeze(-2) * share.unsqueeze(-1).to(tokens.dtype))
        after = (each * scale.unsqueeze(-1)).sum(-2).to(tokens.dtype)
        found = replace(weighing, before=True)
        if not _close(made, after, tolerance):
            return None
    _check_gradients(made, after, values, output)
    return found


def _values(
    region: Region, x: fx.Node, weighing: Weighing, sizes: Sizes, alike: bool
) -> _Values | None:
    generator = torch.Generator().manual_seed(0)
    shape, choice = sizes.shape(x), sizes.shape(weighing.indices)
    has_k = len(choice) == len(shape)
    k, count = choice[-1] if has_k else 1, region.count
    if k > count:
        return None
    tokens = torch.randn(shape, generator=generator).to(x.meta["val"].dtype).requires_grad_()
    rows = (1,) * (len(shape) - 1) if alike else shape[:-1]
    order = torch.rand(*rows, count, generator=generator).argsort(-1)[..., :k]
    order = order.expand(*shape[:-1], k)
    chosen = order if has_k else order[..., 0]
    weights = torch.rand(sizes.shape(weighing.weights), generator=generator)
    weights = weights.to(weighing.weights.meta["val"].dtype)
    one_hot = F.one_hot(order, count)
    if weighing.spread:
        weights = weights * one_hot.sum(-2)
    weights.requires_grad_()
    share = weights * one_hot.sum(-2) if weighing.spread else None
    known = {x: tokens, weighing.indices: chosen, weighing.weights: weights}
    if share is None:
        taken = torch.ones(order.shape)
        if weighing.kept is not None:
            taken = torch.rand(order.shape, generator=generator).round()
            mask = taken.unsqueeze(-1) * one_hot
            kept = sizes.shape(weighing.kept)
            mask = mask.sum(-2) if len(kept) == len(shape) else mask
            known[weighing.kept] = mask.to(weighing.kept.meta["val"].dtype)
        spread = weights if has_k else weights.unsqueeze(-1)
        share = ((taken * spread).unsqueeze(-1) * one_hot).sum(-2)
    return _Values(tokens, order, weights, share, known)


def _small_limits(output: fx.Node, known: Mapping[fx.Node, Any]) -> _Changed:
    """Return other arguments for comparisons of running counts: with 1 in the place of numbers."""
    inside = needed(output, known, {})
    counted: set[fx.Node] = set()
    found: dict[fx.Node, tuple[Any, Any]] = {}
    for node in inside:
        if op_name(node) == "cumsum" or any(each in counted for each in node.all_input_nodes):
            counted.add(node)
        if op_name(node) not in _LIMITS or node not in counted:
            continue
        args = tuple(1 if type(each) in (int, float) and each > 1 else each for each in node.args)
        if args != node.args:
            found[node] = (args, dict(node.kwargs))
    return found


def _check_gradients(made: Tensor, wanted: Tensor, values: _Values, output: fx.Node) -> None:
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(wanted.shape, generator=generator)
    leaves = (values.tokens, values.weights)
    gradients = [
        torch.autograd.grad((y * direction).sum(), leaves, allow_unused=True)
        if y.requires_grad
        else (None, None)
        for y in (made, wanted)
    ]
    # Of a spread, the entries that are not chosen are gathered by nobody.
    tolerance = _tolerance(made, *leaves)
    own = values.share.detach() != 0 if values.share.shape == values.weights.shape else None
    for got, expected in zip(*gradients, strict=True):
        same = got is not None and expected is not None
        if same and own is not None and got.shape == own.shape:
            got, expected = got * own, expected * own
        if not same or not _close(got, expected, tolerance):
            raise NearMiss("the gradient of its weights or tokens is stopped on the way", output)


def _check_kept(weighing: Weighing, count: int) -> None:
    """Check that the mask has ones only where a token has chosen.

    Raises:
        Miss: It has others, or cannot be tried.
    """
    assert weighing.kept is not None
    reason = "its mask of tokens within capacity holds more than the choices"
    for small in (False, True):
        sizes = Sizes()
        shape = sizes.shape(weighing.indices)
        chosen = torch.randint(count, shape, generator=torch.Generator().manual_seed(2))
        known = {weighing.indices: chosen}
        changed = _small_limits(weighing.kept, known) if small else {}
        mask = evaluate(weighing.kept, known, {}, sizes, changed)
        one_hot = F.one_hot(chosen, count)
        if mask.dim() < one_hot.dim():
            one_hot = one_hot.amax(-2)
        if mask.shape != one_hot.shape or not bool(((mask == 0) | (one_hot * mask == 1)).all()):
            raise NearMiss(reason, weighing.kept)


def _check_spread(weighing: Weighing, count: int, products: Mapping[fx.Node, Product]) -> None:
    """Check that a weight for every expert is 0 for those that are not chosen.

    Raises:
        Miss: It is not, or cannot be tried.
    """
    sizes = Sizes()
    generator = torch.Generator().manual_seed(3)
    known = {
        node: torch.randn(sizes.shape(node), generator=generator).to(node.meta["val"].dtype)
        for node in _scores(weighing, count, products)
    }
    for scores in known.values():
        scores.requires_grad_()
    with torch.enable_grad():
        weights = evaluate(weighing.weights, known, {}, sizes)
        chosen = evaluate(weighing.indices, known, {}, sizes)
        one_hot = F.one_hot(chosen, count)
        one_hot = one_hot.amax(-2) if one_hot.dim() > weights.dim() else one_hot
        others = weights * (1 - one_hot)
        direction = torch.randn(others.shape, generator=generator)
        gradients = (
            torch.autograd.grad((others * direction).sum(), list(known.values()), allow_unused=True)
            if others.requires_grad
            else ()
        )
    if any(bool(each.any()) for each in (others.detach(), *gradients) if each is not None):
        raise NearMiss("experts that are not chosen have weights too", weighing.weights)


def _scores(weighing: Weighing, count: int, products: Mapping[fx.Node, Product]) -> list[fx.Node]:
    """Return what makes a number for each expert: linear layers, and parameters beside them."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = [weighing.weights, weighing.indices]
    while stack:
        node = stack.pop()
        value = node.meta.get("val")
        if node in seen or not isinstance(value, Tensor | tuple | list):
            continue
        seen.add(node)
        product = products.get(node)
        source = node.op == "get_attr" or (product is not None and product.kind == "one")
        if source and isinstance(value, Tensor) and value.dim() and value.shape[-1] == count:
            found.add(node)
        else:
            stack.extend(node.all_input_nodes)
    return sorted(found)


def _is_quiet(feed: Feed) -> bool:
    """Whether an expert makes zeros of zeros, or is never asked to."""
    if feed.down.kind in ("runs", "rows"):
        return True
    biased = any(product.bias is not None for product in feed.products)
    return not biased and feed.is_zero_at_zero()


def _tolerance(*values: Tensor) -> float:
    """Return what rounding may do where values of these types are multiplied."""
    return max(_CLOSE.get(value.dtype, 2e-2) for value in values)


def _close(left: Tensor, right: Tensor, tolerance: float) -> bool:
    """Whether ‖a − b‖ is no more than a part of ‖b‖."""
    if left.shape != right.shape:
        return False
    difference = (left.double() - right.double()).norm()
    return bool(difference <= tolerance * right.double().norm())
