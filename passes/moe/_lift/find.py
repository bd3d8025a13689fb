"""Mixtures of experts: which feed-forward layers are one, and what chooses among them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx

from fxcompress.ir.ops import op_name
from fxcompress.nn import Experts
from passes.moe._lift.feeds import Feed, find_feed
from passes.moe._lift.miss import Miss
from passes.moe._lift.products import Product, find_products
from passes.moe._lift.trial import Sizes, Stub, evaluate, needed

if TYPE_CHECKING:
    from fxcompress.ir import Program

__all__ = ["Found", "Refused", "Search", "find_mixtures", "tensor_names"]

# What chooses experts: its second result, or its only one, holds their numbers.
_CHOICES: Final = frozenset({"topk", "max", "sort", "argsort", "argmax"})
# Several choices of one, put together.
_JOINS: Final = frozenset({"cat", "stack"})
_SUMS: Final = frozenset({"add", "cat", "stack", "sub"})
_CANDIDATES: Final = 6
_CLOSE: Final = 1e-4


@dataclass(frozen=True)
class Found:
    """A mixture of experts in another spelling than the leaf.

    Attributes:
        feeds: One feed-forward layer for all experts, or one each, in their order.
        x: The tokens `[…, width]`.
        weights: `[…, k]`, or `[…]` where each token has one expert.
        indices: The same of the experts' numbers.
        output: The weighted sum.
        count: How many experts there are.
    """

    feeds: tuple[Feed, ...]
    x: fx.Node
    weights: fx.Node
    indices: fx.Node
    output: fx.Node
    count: int


@dataclass(frozen=True)
class Refused:
    """What looks like a mixture of experts and stays: a node, why, and what explains it."""

    node: fx.Node
    reason: str
    because_of: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Search:
    """What a Program holds: leaves, mixtures in another spelling, and what is refused."""

    leaves: tuple[fx.Node, ...] = ()
    found: tuple[Found, ...] = ()
    refused: tuple[Refused, ...] = ()


@dataclass
class _Region:
    """Feed-forward layers that are one mixture, and what they make by expert in a trial."""

    feeds: tuple[Feed, ...]
    count: int
    stubs: dict[fx.Node, Stub] = field(default_factory=dict)


def find_mixtures(program: Program) -> Search:
    """Return every mixture of experts, in graph order."""
    leaves = tuple(
        node
        for node in program.nodes
        if node.op == "call_module"
        and isinstance(program.module.get_submodule(str(node.target)), Experts)
    )
    products = find_products(program)
    refused: list[Refused] = []
    feeds: list[Feed] = []
    for product in products.values():
        try:
            feed = find_feed(product, products)
        except Miss as miss:
            refused.append(Refused(product.core, miss.reason, miss.nodes))
            continue
        if feed is not None:
            feeds.append(feed)
    found: list[Found] = []
    for region in _regions(program, feeds):
        try:
            mixture = _mixture(program, region)
        except Miss as miss:
            refused.append(Refused(region.feeds[-1].down.core, miss.reason, miss.nodes))
            continue
        if mixture is not None:
            found.append(mixture)
    known = {each.node for each in refused} | {p.core for feed in feeds for p in feed.products}
    for product in products.values():
        if product.kind == "runs" and product.core not in known:
            refused.append(Refused(product.core, "it is part of no feed-forward layer of experts"))
    return Search(leaves, tuple(found), tuple(sorted(refused, key=lambda each: each.node)))


def _regions(program: Program, feeds: Iterable[Feed]) -> Iterator[_Region]:
    """Yield the feed-forward layers that may be one mixture."""
    state = program.state()
    alike: dict[tuple[Any, ...], list[Feed]] = defaultdict(list)
    for feed in feeds:
        if feed.down.kind != "one":
            yield _stacked(feed, state[feed.down.weight.name].shape[0])
            continue
        gate = None if feed.gate is None else feed.gate[1]
        shapes = [tuple(p.node.meta["val"].shape[-1:]) for p in feed.products]
        alike[feed.x, feed.activation, gate, feed.up[1], tuple(shapes)].append(feed)
    for group in alike.values():
        group = [feed for feed in group if _is_chosen(feed)]
        if len(group) > 1:
            yield _Region(tuple(group), len(group), _scaled(group))


def _scaled(feeds: list[Feed]) -> dict[fx.Node, Stub]:
    def stub(expert: int, feed: Feed) -> Stub:
        return Stub((feed.x,), lambda x: x * (1.0 + expert))

    return {feed.down.node: stub(expert, feed) for expert, feed in enumerate(feeds)}


def _stacked(feed: Feed, count: int) -> _Region:
    """Return the region of one layer for all experts: expert e multiplies tokens by 1 + e."""
    product = feed.down
    if product.kind == "all":
        factors = 1.0 + torch.arange(count).reshape(-1, 1, 1)
        stub = Stub((feed.x,), lambda x: (x * factors).to(x.dtype))
    elif product.kind == "rows":
        assert product.choice is not None
        stub = Stub(
            (feed.x, product.choice), lambda x, e: (x * (1.0 + e).unsqueeze(-1)).to(x.dtype)
        )
    else:
        assert product.choice is not None
        stub = Stub((feed.x, product.choice), _by_runs)
    return _Region((feed,), count, {product.node: stub})


def _by_runs(x: Tensor, ends: Tensor) -> Tensor:
    counts = torch.diff(ends.long(), prepend=torch.zeros(1, dtype=torch.long))
    expert = torch.repeat_interleave(torch.arange(len(ends)), counts)
    return (x * (1.0 + expert).unsqueeze(-1)).to(x.dtype)


def _is_chosen(feed: Feed) -> bool:
    """Whether what is made of its output reads a choice that its own input does not."""
    node, before = feed.down.node, _ancestors([feed.x], ())
    for _ in range(3):
        for user in node.users:
            if op_name(user) in _SUMS:
                continue  # what is added to it weighs it not
            others = [each for each in user.all_input_nodes if each is not node]
            reached = _ancestors(others, {feed.x, node}) | set(others)
            if any(op_name(each) in _CHOICES and each not in before for each in reached):
                return True
        if len(node.users) != 1:
            return False
        node = next(iter(node.users))
    return False


def _ancestors(nodes: Iterable[fx.Node], stop: Iterable[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    ends, stack = set(stop), list(nodes)
    while stack:
        for each in stack.pop().all_input_nodes:
            if each not in found and each not in ends:
                found.add(each)
                stack.append(each)
    return found


def _mixture(program: Program, region: _Region) -> Found | None:
    """Return the mixture of a region.

    Raises:
        Miss: It is not the weighted sum of the chosen experts.
    """
    ends = [feed.down.node for feed in region.feeds]
    feed = region.feeds[0]
    sums = _sums(program, ends)
    if not sums:
        raise Miss("nothing sums what its experts make", feed.down.node)
    choices = _choices(sums, feed, region.count)
    if not choices:
        raise Miss("nothing in the graph chooses its experts (no top-k and no largest)", *ends[:1])
    reason = Miss("what is made of its experts is not their weighted sum", feed.down.node)
    for indices in choices:
        for x in _tokens(feed, indices):
            shape = _shape(x)
            for output in (each for each in sums if _shape(each) == shape):
                for weights in _weights(output, indices, x, region.count):
                    try:
                        fits = _is_weighted_sum(region, x, weights, indices, output)
                    except Miss as miss:
                        reason = miss
                        continue
                    if fits:
                        found = Found(region.feeds, x, weights, indices, output, region.count)
                        _check_private(program, region, found)
                        return found
    raise reason


def _shape(node: fx.Node) -> list[Any]:
    """Return a traced tensor's sizes, to compare: `==` of two dynamic ones would fix them."""
    sizes = node.meta["val"].shape
    return [size if isinstance(size, int) else size.node.expr for size in sizes]


def _nearest(nodes: Iterable[fx.Node], stop: Iterable[fx.Node], most: int) -> Iterator[fx.Node]:
    """Yield what nodes are computed from, the nearest first, and not far."""
    seen = {*stop, *nodes}
    frontier = list(nodes)
    while frontier and len(seen) < most:
        fresh = {each for node in frontier for each in node.all_input_nodes} - seen
        seen |= fresh
        frontier = sorted(fresh, reverse=True)
        yield from frontier


def _sums(program: Program, ends: list[fx.Node]) -> list[fx.Node]:
    """Return tensors that are made of every expert's output, the first few."""
    places = {node: 1 << place for place, node in enumerate(ends)}
    every = (1 << len(ends)) - 1
    reached: dict[fx.Node, int] = {}
    found: list[fx.Node] = []
    for node in program.nodes:
        reads = places.get(node, 0)
        for each in node.all_input_nodes:
            reads |= reached.get(each, 0)
        if not reads:
            continue
        reached[node] = reads
        value = node.meta.get("val")
        if reads == every and isinstance(value, Tensor) and value.is_floating_point():
            found.append(node)
        if len(found) > 2 * _CANDIDATES:
            break
    return found


def _choices(sums: list[fx.Node], feed: Feed, count: int) -> list[fx.Node]:
    """Return tensors of experts' numbers, the nearest first."""
    found = []
    for node in _nearest(sums[:1] + sums[-1:], [feed.x], _far(count)):
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.is_floating_point() or value.dim() == 0:
            continue
        source = _source(node)
        second = op_name(node) != "getitem" or node.args[1] == 1
        chosen = op_name(source) in _CHOICES and second
        if (chosen or op_name(node) in _JOINS) and value.dtype is torch.int64:
            found.append(node)
    # A sort may be the choice, but mostly puts tokens in order.
    found.sort(key=lambda node: "sort" in op_name(_source(node)))
    return found[:_CANDIDATES]


def _source(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0] if op_name(node) == "getitem" else node


def _far(count: int) -> int:
    """Return how many nodes around so many experts are looked at."""
    return 100 + 16 * count


def _tokens(feed: Feed, indices: fx.Node) -> list[fx.Node]:
    """Return tensors that may be the tokens: one row for each choice."""
    width = _shape(feed.x)[-1]
    rows = _shape(indices)
    wanted = ([*rows[:-1], width], [*rows, width])
    found, seen, stack = [], {feed.x}, [feed.x]
    while stack and len(seen) < _CANDIDATES**2:
        node = stack.pop(0)
        value = node.meta.get("val")
        if isinstance(value, Tensor) and _shape(node) in wanted and value.is_floating_point():
            found.append(node)
            break
        fresh = [each for each in node.all_input_nodes if each not in seen]
        seen.update(fresh)
        stack.extend(fresh)
    return found


def _weights(output: fx.Node, indices: fx.Node, x: fx.Node, count: int) -> list[fx.Node]:
    """Return tensors that may be the weights: a number for each choice, the nearest first."""
    wanted = _shape(indices)
    found = [
        node
        for node in _nearest([output], [x, indices], _far(count))
        if isinstance(node.meta.get("val"), Tensor)
        and node.meta["val"].is_floating_point()
        and node.op != "get_attr"
        and len(node.meta["val"].shape) == len(wanted)
        and _shape(node) == wanted
    ]
    return found[: 2 * _CANDIDATES]


@torch.enable_grad()
@torch.enable_grad()
def _is_weighted_sum(
    region: _Region, x: fx.Node, weights: fx.Node, indices: fx.Node, output: fx.Node
) -> bool:
    """Try it: with experts that multiply by 1 + e the output is Σ weights · x · (1 + e)."""
    sizes = Sizes()
    generator = torch.Generator().manual_seed(0)
    shape, choice = sizes.shape(x), sizes.shape(indices)
    per_token = len(choice) == len(shape)
    k = choice[-1] if per_token else 1
    if k > region.count:
        return False
    dtypes = x.meta["val"].dtype, weights.meta["val"].dtype
    tokens = torch.randn(shape, generator=generator).to(dtypes[0]).requires_grad_()
    order = torch.rand(*shape[:-1], region.count, generator=generator).argsort(-1)[..., :k]
    chosen = order if per_token else order[..., 0]
    factors = torch.rand(choice, generator=generator).to(dtypes[1]).requires_grad_()
    known: Mapping[fx.Node, Any] = {x: tokens, indices: chosen, weights: factors}
    made = evaluate(output, known, region.stubs, sizes)
    spread = factors if per_token else factors.unsqueeze(-1)
    wanted = tokens * ((1.0 + order) * spread).sum(-1, keepdim=True).to(dtypes[0])
    if not _close(made, wanted):
        return False
    direction = torch.randn(wanted.shape, generator=generator)
    gradients = [
        torch.autograd.grad((y * direction).sum(), (tokens, factors), allow_unused=True)
        if y.requires_grad
        else (None, None)
        for y in (made, wanted)
    ]
    if not all(g is not None and _close(g, w) for g, w in zip(*gradients, strict=True)):
        raise Miss("the gradient of its weights or tokens is stopped on the way", output)
    return True


def _close(left: Tensor, right: Any) -> bool:
    close = _CLOSE if left.dtype is torch.float32 else 5e-2
    return left.shape == right.shape and torch.allclose(left, right, rtol=close, atol=close)


def _check_private(program: Program, region: _Region, found: Found) -> None:
    """Check that nothing else reads what the experts make, or their tensors.

    Raises:
        Miss: Something does.
    """
    products = [product for feed in region.feeds for product in feed.products]
    inside = needed(found.output, {found.x: 0, found.weights: 0, found.indices: 0}, {})
    within, made = set(inside), {product.core for product in products}
    for node in inside:
        if node in made or any(each in made for each in node.all_input_nodes):
            made.add(node)
            outer = next((user for user in node.users if user not in within), None)
            if outer is not None and node is not found.output:
                raise Miss("something else reads what it computes inside", node, outer)
    names = tensor_names(products)
    owners = {name.rpartition(".")[0] for name in names}
    for node in program.nodes:
        target = str(node.target)
        reads = node.op == "get_attr" and target in names
        if node not in within and (reads or (node.op == "call_module" and target in owners)):
            raise Miss("something else reads the tensors of its experts", node)


def tensor_names(products: Iterable[Product]) -> set[str]:
    """Return the names of the tensors that products read."""
    return {t.name for p in products for t in (p.weight, p.bias) if t is not None}
