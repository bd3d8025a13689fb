"""Which feed-forward layers may be one mixture, and what stands for them in a trial."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx

from fxcompress.ir.ops import op_name, op_spec
from passes.moe._lift.einsum import Layout, written
from passes.moe._lift.feeds import Feed
from passes.moe._lift.trial import Stub

if TYPE_CHECKING:
    from fxcompress.ir import Program

__all__ = ["CHOICES", "Region", "bend", "is_chosen", "regions_of"]

# What chooses experts: its second result, or its only one, holds their numbers.
CHOICES: Final = frozenset({"topk", "max", "sort", "argsort", "argmax"})
_SUMS: Final = frozenset({"add", "cat", "stack", "sub"})


@dataclass
class Region:
    """Feed-forward layers that are one mixture, and what they make by expert in a trial."""

    feeds: tuple[Feed, ...]
    count: int
    stubs: dict[fx.Node, Stub] = field(default_factory=dict)


def bend(x: Tensor) -> Tensor:
    """Return what every expert makes of tokens in a trial, but for a factor of its own.

    It is not linear, so that a weight before an expert is none after it, and 0 at 0.
    """
    return x + x * x.abs()


def regions_of(program: Program, feeds: Iterable[Feed]) -> Iterator[Region]:
    """Yield the feed-forward layers that may be one mixture."""
    state = program.state()
    alike: dict[tuple[Any, ...], list[Feed]] = defaultdict(list)
    for feed in feeds:
        if feed.down.kind != "one":
            yield _stacked(feed, state[feed.down.weight.name].shape[0])
            continue
        gate = None if feed.gate is None else feed.gate[1]
        shapes = [tuple(p.node.meta["val"].shape[-1:]) for p in feed.products]
        kind = (feed.activation, feed.limit, feed.dropout, gate, feed.up[1])
        alike[feed.x, kind, tuple(shapes)].append(feed)
    for group in alike.values():
        group = [feed for feed in group if is_chosen(feed.down.node, feed.x)]
        if len(group) > 1:
            yield Region(tuple(group), len(group), _scaled(group))


def _scaled(feeds: list[Feed]) -> dict[fx.Node, Stub]:
    def stub(expert: int, feed: Feed) -> Stub:
        return Stub((feed.x,), lambda x: bend(x) * (1.0 + expert))

    return {feed.down.node: stub(expert, feed) for expert, feed in enumerate(feeds)}


def _stacked(feed: Feed, count: int) -> Region:
    """Return the region of one layer for all experts."""
    product = feed.down
    layout = _layout(feed)
    if layout is not None:
        equation = written(layout)
        numbers = 1.0 + torch.arange(count)
        stub = Stub((feed.x,), lambda x: torch.einsum(equation, bend(x), numbers.to(x.dtype)))
    elif product.kind == "all":
        factors = 1.0 + torch.arange(count).reshape(-1, 1, 1)
        stub = Stub((feed.x,), lambda x: (bend(x) * factors).to(x.dtype))
    elif product.kind == "rows":
        assert product.choice is not None
        stub = Stub(
            (feed.x, product.choice), lambda x, e: (bend(x) * (1.0 + e).unsqueeze(-1)).to(x.dtype)
        )
    else:
        assert product.choice is not None
        stub = Stub((feed.x, product.choice), _by_runs)
    return Region((feed,), count, {product.node: stub})


def _layout(feed: Feed) -> Layout | None:
    """Return which dimension of tokens and output is what, where products are einsums."""
    first, last = feed.up[0].layout, feed.down.layout
    return None if first is None or last is None else first.then(last)


def _by_runs(x: Tensor, ends: Tensor) -> Tensor:
    counts = torch.diff(ends.long(), prepend=torch.zeros(1, dtype=torch.long))
    expert = torch.repeat_interleave(torch.arange(len(ends)), counts)
    return (bend(x) * (1.0 + expert).unsqueeze(-1)).to(x.dtype)


def is_chosen(node: fx.Node, x: fx.Node, steps: int = 3, *, through: bool = False) -> bool:
    """Whether what is made of a node reads a choice that its own input `x` does not.

    Args:
        node: What may be weighed.
        x: What it is computed from.
        steps: How many nodes, one after the other, are looked at.
        through: Whether to look behind products too.
    """
    before = _ancestors([x], ())
    for _ in range(steps):
        for user in node.users:
            if op_name(user) in _SUMS:
                continue  # what is added to it weighs it not
            others = [each for each in user.all_input_nodes if each is not node]
            reached = _ancestors(others, {x, node}) | set(others)
            if any(op_name(each) in CHOICES and each not in before for each in reached):
                return True
        if len(node.users) != 1:
            return False
        node = next(iter(node.users))
        spec = op_spec(op_name(node))
        if spec is not None and spec.kind in ("linear", "matmul") and not through:
            return False
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
