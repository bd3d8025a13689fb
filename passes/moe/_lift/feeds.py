"""Feed-forward layers of experts: products, and the activation between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, fx

from fxcompress.ir.ops import bind, op_name, op_spec
from fxcompress.nn.experts import ACTIVATIONS, GATES
from passes.moe._lift.miss import Miss
from passes.moe._lift.products import Product
from passes.moe._lift.trial import Sizes, Stub, evaluate

__all__ = ["Feed", "Part", "find_feed", "part_of"]

Part = Literal["all", "first", "second", "even", "odd"]
_MOST: Final = 40
_CLOSE: Final = 1e-5
_WANTED: Final = ("runs", "rows", "all")


@dataclass(frozen=True)
class Feed:
    """`down(act(gate x) · up x)`, for one expert or for all.

    Attributes:
        down: The last product.
        up: The product that makes `up`, and which of its outputs are that.
        gate: The same of the gate, which may be the same product, or None.
        activation: A name that `fxcompress.nn.Experts` knows.
    """

    down: Product
    up: tuple[Product, Part]
    gate: tuple[Product, Part] | None
    activation: str

    @property
    def x(self) -> fx.Node:
        """The tokens."""
        return self.up[0].x

    @property
    def products(self) -> tuple[Product, ...]:
        """Every product."""
        gate = () if self.gate is None else (self.gate[0],)
        return tuple(dict.fromkeys((*gate, self.up[0], self.down)))


def find_feed(down: Product, products: Mapping[fx.Node, Product]) -> Feed | None:
    """Return the feed-forward layer that ends in a product, or None where it is no such end.

    Raises:
        Miss: It looks like one of experts, but does something else in between.
    """
    ups = _sources(down, products)
    if not ups:
        return None
    if any(up.kind != down.kind or up.choice is not down.choice for up in ups):
        return None
    if len(ups) > 2 or len({up.x for up in ups}) != 1:
        return None
    feed = _by_trial(down, ups)
    if feed is None and down.kind in _WANTED:
        raise Miss("what is between its products is no activation that is known", down.core)
    return feed


def _sources(down: Product, products: Mapping[fx.Node, Product]) -> list[Product]:
    """Return the products that `down` multiplies, elementwise ops and slices in between."""
    found: dict[Product, None] = {}
    stack, seen = [down.x], {down.x}
    while stack:
        node = stack.pop()
        if node in products:
            found[products[node]] = None
            continue
        spec = op_spec(op_name(node))
        if spec is None or len(seen) > _MOST or node.op in ("placeholder", "get_attr"):
            return []
        if spec.kind == "dropout" and _drops(node):
            if down.kind in _WANTED:
                raise Miss("it drops values while training, which the leaf does not", node)
            return []
        if not (spec.elementwise or spec.kind in ("shape", "index")):
            return []
        fresh = [n for n in node.all_input_nodes if n not in seen]
        seen.update(fresh)
        stack.extend(fresh)
    return sorted(found, key=lambda each: each.node)


def _drops(node: fx.Node) -> bool:
    if node.op == "call_module":
        module: Any = node.graph.owning_module.get_submodule(str(node.target))  # type: ignore[union-attr]
        return bool(getattr(module, "p", 1.0))
    return bool(bind(node).get("p", 1.0))


def _by_trial(down: Product, ups: list[Product]) -> Feed | None:
    """Find the activation, and which outputs are the gate, on random numbers."""
    sizes = Sizes()
    generator = torch.Generator().manual_seed(0)
    shapes = [sizes.shape(up.node) for up in ups]
    dtype = ups[0].node.meta["val"].dtype
    known = {
        up.node: (4 * torch.randn(shape, generator=generator)).to(dtype)
        for up, shape in zip(ups, shapes, strict=True)
    }
    stubs: dict[fx.Node, Stub] = {}
    try:
        inner = evaluate(down.x, known, stubs, sizes)
    except Miss:
        return None
    for gate, up in _layouts(ups):
        made = part_of(known[up[0].node], up[1])
        if made.shape != inner.shape:
            continue
        if gate is None:
            names = [name for name, run in ACTIVATIONS.items() if _same(run(made), inner)]
        else:
            held = part_of(known[gate[0].node], gate[1])
            names = [n for n, run in ACTIVATIONS.items() if _same(run(held) * made, inner)]
            names += [n for n, run in GATES.items() if _same(run(held, made), inner)]
        if names:
            return Feed(down, up, gate, names[0])
    return None


def _layouts(
    ups: list[Product],
) -> list[tuple[tuple[Product, Part] | None, tuple[Product, Part]]]:
    one = ups[0]
    if len(ups) == 2:
        pairs = ((one, ups[1]), (ups[1], one))
        return [((gate, "all"), (up, "all")) for gate, up in pairs]
    halves: tuple[tuple[Part, Part], ...] = (
        ("first", "second"), ("second", "first"), ("even", "odd"), ("odd", "even"),
    )  # fmt: skip
    return [(None, (one, "all")), *(((one, gate), (one, up)) for gate, up in halves)]


def part_of(value: Tensor, part: Part, dim: int = -1) -> Tensor:
    """Return some entries of a dimension."""
    half = value.shape[dim] // 2
    indices = {
        "all": slice(None), "first": slice(0, half), "second": slice(half, 2 * half),
        "even": slice(0, None, 2), "odd": slice(1, None, 2),
    }[part]  # fmt: skip
    return value.movedim(dim, 0)[indices].movedim(0, dim)


def _same(left: Tensor, right: Tensor) -> bool:
    close = _CLOSE if right.dtype is torch.float32 else 2e-2
    if left.shape != right.shape:
        return False
    # Most candidates differ at once.
    parts = (slice(0, 64), slice(None))
    pairs = ((left.flatten()[part], right.flatten()[part]) for part in parts)
    return all(torch.allclose(a, b, rtol=close, atol=close) for a, b in pairs)
