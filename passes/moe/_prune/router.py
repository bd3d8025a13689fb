"""Routers: what makes the scores of experts, and how it follows when some go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx

from fxcompress.ir.ops import bind, op_name
from passes.moe._lift.miss import Miss
from passes.moe._lift.products import Product
from passes.moe._lift.trial import Sizes, evaluate
from passes.moe._routing import Call, choice_of

if TYPE_CHECKING:
    from fxcompress.ir import Program

__all__ = ["Router", "check_follows", "check_private", "patches", "router_of"]

# Ops whose arguments are sizes of what they make.
_SIZED: Final = frozenset(
    {"view", "reshape", "expand", "unflatten", "zeros", "ones", "full", "new_zeros", "new_ones",
     "new_full", "empty", "rand", "randn"}
)  # fmt: skip
_COUNTED: Final = frozenset({"one_hot", "arange", "bincount", "histc"})
_CLOSE: Final = 1e-5

Patches = Mapping[fx.Node, tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Router:
    """What chooses the experts of one call.

    Attributes:
        call: The call.
        count: How many experts there are.
        k: How many a token takes.
        groups: How many groups experts are chosen in; 1 where there are none.
        scores: Products that make a number for each expert.
        entries: Nodes that read a parameter with an entry for each expert: biases.
        region: The nodes between these and the call, in graph order.
    """

    call: Call
    count: int
    k: int
    groups: int
    scores: tuple[Product, ...]
    entries: tuple[fx.Node, ...]
    region: tuple[fx.Node, ...]


def router_of(call: Call, count: int, products: Mapping[fx.Node, Product]) -> Router:
    """Return the router of a call.

    Args:
        call: A call of experts.
        count: How many there are.
        products: Products with parameters, by the node they end in.

    Raises:
        Miss: It cannot be made to follow.
    """
    choice = choice_of(call.indices)
    # Where tokens are weighed before experts each choice is a row, and the last dimension is 1.
    k = bind(choice).get("k") if choice is not None else call.indices.meta["val"].shape[-1]
    if not isinstance(k, int):
        raise Miss("how many experts a token takes is no fixed number", call.indices)
    scores: dict[Product, None] = {}
    entries: dict[fx.Node, None] = {}
    region: set[fx.Node] = set()
    stack = [call.weights, call.indices]
    while stack:
        node = stack.pop()
        if node in region:
            continue
        product = products.get(node)
        if product is not None and product.kind == "one" and _last(node) == count:
            scores[product] = None
            continue
        if node.op == "get_attr" and _last(node) == count:
            entries[node] = None
            continue
        if node.op == "placeholder":
            raise Miss("its choice reads an input, and no scores alone", node)
        region.add(node)
        stack.extend(
            n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor | tuple)
        )
    if not scores:
        raise Miss("its experts are not chosen by a linear layer with a row for each", call.indices)
    inside = sorted(region)
    known = {*region, call.node, *(p.node for p in scores), *entries}
    for node in (*(p.node for p in scores), *inside):
        _check_reader(node, known, count)
    return Router(
        call, count, k, _groups(inside, count), tuple(scores), tuple(entries), tuple(inside)
    )


def _last(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() == 0:
        return None
    size = value.shape[-1]
    return size if isinstance(size, int) else None


def _check_reader(node: fx.Node, known: set[fx.Node], count: int) -> None:
    """Check that nothing else reads what has a number for each expert."""
    if _last(node) != count:
        return
    other = next((user for user in node.users if user not in known), None)
    if other is not None and op_name(other) not in ("size", "tap"):
        raise Miss("something else reads the scores of its experts", other)


def check_private(program: Program, routers: Iterable[Router]) -> None:
    """Check that what is cut is read by these routers alone.

    Raises:
        Miss: Something else reads a router's rows or an entry.
    """
    known: set[fx.Node] = set()
    names: set[str] = set()
    for router in routers:
        known.update(*(_upstream_state(p.core) for p in router.scores), router.entries)
        for product in router.scores:
            names |= {t.name for t in (product.weight, product.bias) if t is not None}
            if product.weight.index is not None:
                raise Miss("its router is one of a stack", product.core)
        names |= {str(node.target) for node in router.entries}
    owners = {name.rpartition(".")[0] for name in names}
    for node in program.nodes:
        target = str(node.target)
        reads = node.op == "get_attr" and target in names
        if node not in known and (reads or (node.op == "call_module" and target in owners)):
            raise Miss("something else calls its router", node)


def _upstream_state(core: fx.Node) -> set[fx.Node]:
    """Return a product and the nodes that read its matrix."""
    found, stack = {core}, [core]
    while stack:
        for node in stack.pop().all_input_nodes:
            if node.op == "get_attr" or len(node.all_input_nodes) == 1:
                found.add(node)
                stack.append(node)
    return {node for node in found if node is core or node.op == "get_attr"}


def _groups(region: Iterable[fx.Node], count: int) -> int:
    for node in region:
        value = node.meta.get("val")
        if op_name(node) in ("view", "reshape", "unflatten") and isinstance(value, Tensor):
            last = list(value.shape[-2:])
            sizes = all(isinstance(size, int) for size in last)
            if len(last) == 2 and sizes and last[0] * last[1] == count:
                return int(last[0])
    return 1


def patches(router: Router, left: int) -> Patches:
    """Return other arguments for nodes whose sizes count experts, or those of a group."""
    found: dict[fx.Node, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    sizes = {router.count: left}
    if router.groups > 1:
        sizes = {router.count // router.groups: left // router.groups, **sizes}
    for node in router.region:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            continue
        name = op_name(node)
        last = _last(node)
        if name in _SIZED and last in sizes and _counts_experts(node, router):
            assert last is not None
            changed = _resized(node, sizes[last])
        elif name in _COUNTED:
            changed = _recounted(node, router.count, left)
        else:
            continue
        if changed != (tuple(node.args), dict(node.kwargs)):
            found[node] = changed
    return found


def _recounted(node: fx.Node, count: int, left: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a node's arguments with the number of experts in them replaced."""

    def new(value: Any) -> Any:
        return left if type(value) is int and value == count else value

    return tuple(map(new, node.args)), {name: new(value) for name, value in node.kwargs.items()}


def _counts_experts(node: fx.Node, router: Router) -> bool:
    """Whether the last dimension is experts: all of them, or with one before it a group's."""
    value = node.meta["val"]
    if _last(node) == router.count:
        return True
    return bool(value.dim() >= 2 and value.shape[-2] == router.groups)


def _resized(node: fx.Node, size: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a node's arguments with the last size in them replaced."""

    def last(given: Sequence[Any]) -> tuple[Any, ...]:
        changed = list(given)
        for place in range(len(changed) - 1, -1, -1):
            each = changed[place]
            if isinstance(each, list | tuple) and each:
                changed[place] = last(each)
                return tuple(changed)
            if type(each) is int:
                changed[place] = each if each == -1 else size
                return tuple(changed)
        return tuple(changed)

    kwargs = {
        name: last(value) if isinstance(value, list | tuple) else value
        for name, value in node.kwargs.items()
    }
    args: tuple[Any, ...] = tuple(node.args)
    # Values of `full` come after its sizes.
    if op_name(node) in ("full", "new_full"):
        place = next(i for i, each in enumerate(args) if isinstance(each, list | tuple))
        return (*args[:place], last(args[place]), *args[place + 1 :]), kwargs
    return last(args), kwargs


def check_follows(router: Router, kept: Sequence[int]) -> None:
    """Try that the router of what is kept equals the whole one with the others at −∞.

    Raises:
        Miss: It does not, or cannot be tried.
    """
    sizes = Sizes()
    generator = torch.Generator().manual_seed(0)
    index = torch.tensor(kept)
    gone = torch.ones(router.count, dtype=torch.bool)
    gone[index] = False
    whole: dict[fx.Node, Any] = {}
    part: dict[fx.Node, Any] = {}
    for node in (*(p.node for p in router.scores), *router.entries):
        values = torch.randn(sizes.shape(node), generator=generator).to(node.meta["val"].dtype)
        additive = node.op != "get_attr" or all(op_name(u) in ("add", "sub") for u in node.users)
        whole[node] = values.masked_fill(gone, float("-inf")) if additive else values
        part[node] = values[..., index]
    changed = patches(router, len(kept))
    wanted = _chosen(router, whole, sizes, {})
    got = _chosen(router, part, sizes, changed)
    same = torch.equal(index[got[0]], wanted[0]) and torch.allclose(got[1], wanted[1], atol=_CLOSE)
    if not same:
        raise Miss(
            "without some experts its router does not choose as with their scores at −∞",
            router.call.indices,
        )


def _chosen(
    router: Router, known: Mapping[fx.Node, Any], sizes: Sizes, changed: Patches
) -> tuple[Tensor, Tensor]:
    """Return chosen experts and their weights, each token's in the order of the experts."""
    indices = evaluate(router.call.indices, known, {}, sizes, changed)
    weights = evaluate(router.call.weights, known, {}, sizes, changed)
    order = indices.argsort(-1)
    return indices.gather(-1, order), weights.gather(-1, order).float()
