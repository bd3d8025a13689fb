"""Feed-forward layers of experts: products, and the activation between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Final, Literal

import torch
from torch import Tensor, fx

from fxcompress.ir.ops import bind, module_of, op_name, op_spec
from fxcompress.nn.experts import ACTIVATIONS, GATES
from passes.moe._lift.einsum import STACKED, Layout
from passes.moe._lift.miss import Miss
from passes.moe._lift.products import Product
from passes.moe._lift.trial import Sizes, Stub, evaluate, is_dropout

__all__ = ["Feed", "Part", "drops", "find_feed", "part_of"]

Part = Literal["all", "first", "second", "even", "odd"]
_MOST: Final = 40
_FEW: Final = 512
_DIFFERENT: Final = 0.1
_CLOSE: Final = {torch.float64: 1e-12, torch.float32: 1e-6}


@dataclass(frozen=True)
class Feed:
    """`down(act(gate x) · up x)`, for one expert or for all.

    Attributes:
        down: The last product.
        up: The product that makes `up`, and which of its outputs are that.
        gate: The same of the gate, which may be the same product, or None.
        activation: A name that `fxcompress.nn.Experts` knows.
        limit: At which `gate` is cut off above and `up` both ways, or None.
        dropout: How likely a value before `down` is dropped while training.
        dropped: The node that does it.
        problem: Why it cannot be an expert of the leaf, in words.
    """

    down: Product
    up: tuple[Product, Part]
    gate: tuple[Product, Part] | None = None
    activation: str = ""
    limit: float | None = None
    dropout: float = 0.0
    dropped: tuple[fx.Node, ...] = ()
    problem: str | None = None

    @property
    def x(self) -> fx.Node:
        """The tokens."""
        return self.up[0].x

    @property
    def products(self) -> tuple[Product, ...]:
        """Every product."""
        gate = () if self.gate is None else (self.gate[0],)
        return tuple(dict.fromkeys((*gate, self.up[0], self.down)))

    def is_zero_at_zero(self) -> bool:
        """Whether zeros between its products stay zeros, with and without a gate."""
        zero = torch.zeros(1)
        if self.activation in GATES:
            return not bool(GATES[self.activation](zero, zero).any())
        return self.gate is not None or not bool(ACTIVATIONS[self.activation](zero).any())


def find_feed(down: Product, products: Mapping[fx.Node, Product]) -> Feed | None:
    """Return the feed-forward layer that ends in a product, or None where it is no such end."""
    ups, between = _sources(down, products)
    if not ups:
        return None
    if any(up.kind != down.kind or up.choice is not down.choice for up in ups):
        return None
    if len(ups) > 2 or len({(up.x, up.layout) for up in ups}) != 1:
        return None
    if _is_crossed(ups[0].layout, down.layout):
        return None
    if all(_moves(node) for node in between):
        return None
    unknown = Feed(down, (ups[0], "all"))
    dropped = [node for node in between if drops(node)]
    if dropped and dropped != _last(down, ups):
        return replace(unknown, problem="it drops values before its activation is done")
    limits = sorted({limit for node in between if (limit := _limit(node)) is not None})
    found = _by_trial(down, ups, limits)
    if found is None:
        problem = "what is between its products is no activation that is known"
        return replace(unknown, problem=problem)
    rate = _rate(dropped[0]) if dropped else 0.0
    return replace(found, dropout=rate, dropped=tuple(dropped))


def _sources(
    down: Product, products: Mapping[fx.Node, Product]
) -> tuple[list[Product], list[fx.Node]]:
    """Return the products that `down` multiplies, and the elementwise ops and slices between."""
    found: dict[Product, None] = {}
    between: list[fx.Node] = []
    stack, seen = [down.x], {down.x}
    while stack:
        node = stack.pop()
        if node in products:
            found[products[node]] = None
            continue
        spec = op_spec(op_name(node))
        if spec is None or len(seen) > _MOST or node.op in ("placeholder", "get_attr"):
            return [], []
        if not (spec.elementwise or spec.kind in ("shape", "index", "dropout")):
            return [], []
        between.append(node)
        fresh = [n for n in node.all_input_nodes if n not in seen]
        seen.update(fresh)
        stack.extend(fresh)
    return sorted(found, key=lambda each: each.node), between


def _is_crossed(first: Layout | None, last: Layout | None) -> bool:
    """Whether an einsum reads as rows what another has made by expert, or the other way round."""
    if first is None or last is None:
        return any(each not in (None, STACKED) for each in (first, last))
    return first.then(last) is None


def _moves(node: fx.Node) -> bool:
    """Whether a node gives values another shape and leaves them as they are."""
    spec = op_spec(op_name(node))
    return spec is not None and spec.kind in ("shape", "index", "identity")


def drops(node: fx.Node) -> bool:
    """Whether a node drops values while training."""
    return is_dropout(node) and _rate(node) > 0


def _rate(node: fx.Node) -> float:
    if node.op == "call_module":
        return float(getattr(module_of(node), "p", 1.0))
    return float(bind(node).get("p", 1.0))


def _last(down: Product, ups: Iterable[Product]) -> list[fx.Node]:
    """Return the dropout that `down` reads, casts and other shapes between; at most one."""
    node, ends = down.x, {up.node for up in ups}
    while node not in ends:
        spec = op_spec(op_name(node))
        if op_name(node) == "dropout":
            return [node]
        if spec is None or spec.kind not in ("shape", "identity") or len(node.all_input_nodes) != 1:
            return []
        node = node.all_input_nodes[0]
    return []


def _limit(node: fx.Node) -> float | None:
    """Return the upper end of a clamp."""
    if op_name(node) != "clamp":
        return None
    top = bind(node).get("max")
    return float(top) if isinstance(top, int | float) else None


def _by_trial(down: Product, ups: list[Product], limits: Iterable[float]) -> Feed | None:
    """Find the activation, and which outputs are the gate, on random numbers."""
    sizes = Sizes()
    generator = torch.Generator().manual_seed(0)
    shapes = [sizes.shape(up.node) for up in ups]
    dtype = ups[0].node.meta["val"].dtype
    spread = 4.0 * max((1.0, *limits))
    known = {
        up.node: (spread * torch.randn(shape, generator=generator)).to(dtype)
        for up, shape in zip(ups, shapes, strict=True)
    }
    stubs: dict[fx.Node, Stub] = {}
    try:
        inner = evaluate(down.x, known, stubs, sizes)
    except Miss:
        return None
    for limit in (None, *limits):
        for gate, up in _layouts(ups):
            made = part_of(known[up[0].node], up[1])
            held = None if gate is None else part_of(known[gate[0].node], gate[1])
            name = _activation(held, made, inner, limit)
            if name is not None:
                return Feed(down, up, gate, name, limit)
    return None


def _activation(gate: Tensor | None, up: Tensor, inner: Tensor, limit: float | None) -> str | None:
    """Return the activation that makes `inner`, the closest where several are close."""
    if up.shape != inner.shape or (limit is not None and gate is None):
        return None
    if gate is None:
        made = ((name, run(up)) for name, run in ACTIVATIONS.items())
        return _closest(made, inner)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    gated = ((name, run(gate) * up) for name, run in ACTIVATIONS.items())
    return _closest(chain(gated, ((name, run(gate, up)) for name, run in GATES.items())), inner)


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


def _closest(candidates: Iterable[tuple[str, Tensor]], wanted: Tensor) -> str | None:
    """Return the name of what equals `wanted` but for rounding, the closest of several."""
    close = _CLOSE.get(wanted.dtype, 2e-2)
    errors = {name: _error(made, wanted) for name, made in candidates}
    name = min(errors, key=lambda each: errors[each])
    return name if errors[name] <= close else None


def _error(left: Tensor, right: Tensor) -> float:
    """Return ‖a − b‖ / ‖b‖; of the first values only, where those differ already."""
    if left.shape != right.shape:
        return float("inf")
    few = _ratio(left.flatten()[:_FEW], right.flatten()[:_FEW])
    return few if few > _DIFFERENT else _ratio(left, right)


def _ratio(left: Tensor, right: Tensor) -> float:
    left, right = left.double(), right.double()
    return float((left - right).norm() / right.norm().clamp(min=1e-30))
