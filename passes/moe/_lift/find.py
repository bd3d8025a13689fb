"""Mixtures of experts: which feed-forward layers are one, and what chooses among them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import fx

from fxcompress.nn import Experts
from passes.moe._lift.candidates import choices_of, shape_of, sums_of, tokens_of, weighings_of
from passes.moe._lift.feeds import Feed, drops, find_feed
from passes.moe._lift.found import Found, Refused, Search
from passes.moe._lift.miss import Miss, NearMiss
from passes.moe._lift.near import near_misses
from passes.moe._lift.products import Product, find_products
from passes.moe._lift.regions import Region, regions_of
from passes.moe._lift.trial import needed
from passes.moe._lift.weighted import weighed

if TYPE_CHECKING:
    from fxcompress.ir import Program

__all__ = ["find_mixtures", "tensor_names"]


def find_mixtures(program: Program) -> Search:
    """Return every mixture of experts, in graph order."""
    leaves = tuple(
        node
        for node in program.nodes
        if node.op == "call_module"
        and isinstance(program.module.get_submodule(str(node.target)), Experts)
    )
    products = find_products(program)
    feeds = _feeds(products)
    refused: list[Refused] = []
    found: list[Found] = []
    tried = list(regions_of(program, feeds))
    for region in tried:
        try:
            mixture = _mixture(program, region, products)
        except Miss as miss:
            refused.append(Refused(region.feeds[-1].down.core, miss.reason, miss.nodes))
            continue
        if mixture is not None:
            found.append(mixture)
    told = {each.node for each in refused}
    told |= {p.core for region in tried for feed in region.feeds for p in feed.products}
    refused += near_misses(program, products, feeds, told)
    return Search(leaves, tuple(found), tuple(sorted(refused, key=lambda each: each.node)))


def _feeds(products: Mapping[fx.Node, Product]) -> list[Feed]:
    """Return the feed-forward layers; almost ones only where their products are in no other."""
    made = [find_feed(product, products) for product in products.values()]
    feeds = [feed for feed in made if feed is not None]
    taken = {product for feed in feeds if feed.problem is None for product in feed.products}
    return [each for each in feeds if each.problem is None or taken.isdisjoint(each.products)]


def _mixture(program: Program, region: Region, products: Mapping[fx.Node, Product]) -> Found | None:
    """Return the mixture of a region.

    Raises:
        Miss: It is not the weighted sum of the chosen experts.
    """
    ends = [feed.down.node for feed in region.feeds]
    feed = region.feeds[0]
    problem = next((each.problem for each in region.feeds if each.problem is not None), None)
    if problem is not None:
        raise Miss(problem, feed.down.node)
    sums = sums_of(program, ends)
    if not sums:
        raise Miss("nothing sums what its experts make", feed.down.node)
    choices = choices_of(sums, feed, region.count)
    if not choices:
        raise Miss("nothing in the graph chooses its experts (no top-k and no largest)", *ends[:1])
    reason = Miss("what is made of its experts is not their weighted sum", feed.down.node)
    for indices in choices:
        for x in tokens_of(feed, indices):
            shape = shape_of(x)
            for output in (each for each in sums if shape_of(each) == shape):
                for weighing in weighings_of(output, indices, x, region.count):
                    try:
                        fits = weighed(region, x, output, weighing, products)
                    except Miss as miss:
                        reason = reason if isinstance(reason, NearMiss) else miss
                        continue
                    if fits is not None:
                        found = Found(region.feeds, x, fits, output, region.count)
                        _check_private(program, region, found)
                        return found
    raise reason


def _check_private(program: Program, region: Region, found: Found) -> None:
    """Check that nothing else reads what the experts make, or their tensors.

    Raises:
        Miss: Something does.
    """
    products = [product for feed in region.feeds for product in feed.products]
    inside = needed(found.output, dict.fromkeys((found.x, *found.weighing.nodes), 0), {})
    within, made = set(inside), {product.core for product in products}
    for node in inside:
        if node in made or any(each in made for each in node.all_input_nodes):
            made.add(node)
            outer = next((user for user in node.users if user not in within), None)
            if outer is not None and node is not found.output:
                raise Miss("something else reads what it computes inside", node, outer)
    known = {node for feed in region.feeds for node in feed.dropped}
    for node in inside:
        if drops(node) and node not in known:
            raise Miss(
                "it drops values while training elsewhere than between activation and last matrix, "
                "which the leaf does not",
                node,
            )
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
