"""What looks like experts and became none: which condition failed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor, fx

from fxcompress.ir.ops import op_name
from passes.moe._lift.feeds import Feed
from passes.moe._lift.found import Refused
from passes.moe._lift.products import Product
from passes.moe._lift.regions import CHOICES, is_chosen

if TYPE_CHECKING:
    from fxcompress.ir import Program

__all__ = ["near_misses"]

_FAR: Final = 32
_JOINS: Final = frozenset({"add", "cat", "stack", "sum"})


def near_misses(
    program: Program,
    products: Mapping[fx.Node, Product],
    feeds: Iterable[Feed],
    told: Iterable[fx.Node],
) -> list[Refused]:
    """Return what plainly holds experts, but fits no mixture, with the condition that failed.

    Args:
        program: The model.
        products: Products with parameters, by the node they end in.
        feeds: The feed-forward layers that they make.
        told: Nodes that multiply of which something is said already.
    """
    known = set(told)
    free = [product for product in products.values() if product.core not in known]
    return [*_branches(free, {feed.down.core: feed for feed in feeds}), *_stacks(program, free)]


def _branches(free: Sequence[Product], feeds: Mapping[fx.Node, Feed]) -> list[Refused]:
    """Return branches that read the same tokens with layers of the same shape."""
    alike: dict[tuple[Any, ...], list[Product]] = defaultdict(list)
    for product in free:
        if product.kind == "one":
            alike[product.x, str(product.node.meta["val"].shape)].append(product)
    found: list[Refused] = []
    said: set[fx.Node] = set()
    for x, group in ((key[0], group) for key, group in alike.items()):
        if len({product.weight for product in group}) < 2:
            continue
        chosen = [each for each in group if is_chosen(each.node, x, _FAR, through=True)]
        ends = {_end(each) for each in chosen}
        if len(chosen) > 1 and not ends & said:
            said |= ends
            reason = _why(chosen, feeds)
            found.append(_refused(chosen, f"{len(chosen)} {reason}"))
        elif not chosen and (weighed := _weighed(group, feeds)) and not _cores(weighed) & said:
            said |= _cores(weighed)
            reason = (
                f"{len(weighed)} feed-forward layers that read the same tokens are weighed and "
                "summed, but nothing chooses among them (no top-k and no largest): every token "
                "goes through all"
            )
            found.append(_refused(weighed, reason))
    return found


def _refused(branches: Sequence[Product], reason: str) -> Refused:
    first, *others = branches
    return Refused(first.core, reason, tuple(sorted(_cores(others))))


def _cores(products: Iterable[Product]) -> set[fx.Node]:
    return {product.core for product in products}


def _why(chosen: Sequence[Product], feeds: Mapping[fx.Node, Feed]) -> str:
    """Return what keeps chosen branches from being experts."""
    branches = "branches read the same tokens and are weighed by a choice, as experts are, but "
    made = [
        feed
        for feed in feeds.values()
        if feed.problem is None and feed.up[0] in chosen and is_chosen(feed.down.node, feed.x)
    ]
    if made:
        kinds = {(feed.activation, feed.limit, feed.dropout) for feed in made}
        return branches + (
            "their activations or dropouts differ"
            if len(kinds) > 1
            else "they are feed-forward layers of different sizes"
        )
    return branches + (
        "each is not two or three linear layers with an activation between: "
        + " → ".join(_path(chosen[0]))
    )


def _path(product: Product) -> list[str]:
    """Return the ops of a branch, to where it is joined with something."""
    found, node = ["linear"], product.node
    while len(node.users) == 1 and len(found) < _FAR:
        node = next(iter(node.users))
        if op_name(node) in _JOINS or len(node.all_input_nodes) > 1:
            break
        found.append(op_name(node))
    return found


def _end(product: Product) -> fx.Node:
    """Return the last node that only this branch makes."""
    node = product.node
    for _ in range(_FAR):
        if len(node.users) != 1:
            break
        user = next(iter(node.users))
        if op_name(user) in _JOINS:
            break
        node = user
    return node


def _weighed(group: Sequence[Product], feeds: Mapping[fx.Node, Feed]) -> list[Product]:
    """Return the last products of feed-forward layers that are multiplied and then summed."""
    first = set(group)
    downs = [feed.down for feed in feeds.values() if feed.problem is None and feed.up[0] in first]
    made = [down for down in downs if any(op_name(user) == "mul" for user in down.node.users)]
    return made if len(made) > 1 else []


def _stacks(program: Program, free: Iterable[Product]) -> list[Refused]:
    """Return products with stacks of matrices, among which something chooses."""
    state = program.state()
    found: list[Refused] = []
    for product in free:
        stack = state[product.weight.name]
        if product.kind == "one" or stack.dim() < 3 or product.weight.index is not None:
            continue
        if product.kind == "all" and not (
            is_chosen(product.node, product.x, _FAR, through=True) or _reads_choice(product.x)
        ):
            continue
        reason = (
            f"a stack of {stack.shape[0]} matrices multiplies tokens, but is part of no "
            "feed-forward layer of experts (two or three products with an activation between)"
        )
        found.append(Refused(product.core, reason))
    return found


def _reads_choice(x: fx.Node) -> bool:
    """Whether a choice is among what tokens are computed from, not far."""
    seen, stack = {x}, [x]
    while stack and len(seen) < _FAR:
        node = stack.pop(0)
        if op_name(node) in CHOICES and isinstance(node.meta.get("val"), Tensor | tuple | list):
            return True
        fresh = [each for each in node.all_input_nodes if each not in seen]
        seen.update(fresh)
        stack.extend(fresh)
    return False
