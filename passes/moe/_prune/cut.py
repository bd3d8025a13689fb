"""Cut experts, and the routers that choose them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxcompress.errors import PassError
from fxcompress.nn import Experts, OperandExperts
from passes.moe._lift.miss import Miss
from passes.moe._lift.products import Product, find_products
from passes.moe._prune.router import Router, patches, router_of
from passes.moe._routing import Mixture, find_mixtures, quantizers_of

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter
    from passes.moe.prune_experts import Pruned

__all__ = ["check_cut", "cut"]


def cut(rewriter: GraphRewriter, pruned: Iterable[Pruned]) -> None:
    """Leave the kept experts of each mixture, and what chooses them.

    Raises:
        PassError: A mixture is not there, or its router cannot follow.
    """
    wanted = {each.path: each for each in pruned if len(each.kept) < each.before}
    if not wanted:
        return
    rewriter.propagate()
    products = find_products(rewriter.program)
    done: set[str] = set()
    for mixture in find_mixtures(rewriter.program):
        each = wanted.pop(mixture.path, None)
        if each is not None:
            for call in mixture.calls:
                try:
                    router = router_of(call, each.before, products)
                except Miss as miss:
                    raise PassError(miss.reason, where=each.path) from miss
                _cut_router(rewriter, router, each.kept, done)
            if isinstance(mixture.experts, OperandExperts):
                _cut_operands(rewriter, mixture, each.kept, done)
            else:
                rewriter.set_module(each.path, _kept(mixture, each.kept))
    if wanted:
        raise PassError(f"there are no experts at {next(iter(wanted))}")


def _kept(mixture: Mixture, kept: Sequence[int]) -> Experts:
    index = torch.tensor(kept)
    tensors: dict[str, Any] = {
        name: nn.Parameter(
            parameter.detach().index_select(0, index.to(parameter.device)),
            requires_grad=parameter.requires_grad,
        )
        for name, parameter in mixture.experts.named_parameters()
    }
    return Experts.of(**tensors, **mixture.experts.settings)


def _cut_operands(
    rewriter: GraphRewriter, mixture: Mixture, kept: Sequence[int], done: set[str]
) -> None:
    """Cut stacks that the graph reads, and their quantizers."""
    for name, _ in mixture.experts.named_parameters():
        _cut_tensor(rewriter, f"{mixture.path}.{name}", 0, kept, done)
    for path, quantizer in quantizers_of(mixture).items():
        rewriter.set_module(path, quantizer.select(kept))


def _cut_router(
    rewriter: GraphRewriter, router: Router, kept: Sequence[int], done: set[str]
) -> None:
    for node, (args, kwargs) in patches(router, len(kept)).items():
        rewriter.set_args(node, args, kwargs)
    for product in router.scores:
        _cut_product(rewriter, product, kept, done)
    for node in router.entries:
        _cut_tensor(rewriter, str(node.target), -1, kept, done)


def _cut_product(
    rewriter: GraphRewriter, product: Product, kept: Sequence[int], done: set[str]
) -> None:
    if product.core.op == "call_module":
        path = str(product.core.target)
        if path not in done:
            done.add(path)
            rewriter.set_module(path, _rows(rewriter.get_module(path), kept))
        return
    _cut_tensor(rewriter, product.weight.name, 1 if product.weight.flipped else 0, kept, done)
    if product.bias is not None:
        _cut_tensor(rewriter, product.bias.name, -1, kept, done)


def _rows(layer: Any, kept: Sequence[int]) -> nn.Linear:
    """Return a linear layer with some of another's rows."""
    made = nn.Linear(layer.in_features, len(kept), bias=layer.bias is not None, device="meta")
    for name, parameter in layer.named_parameters():
        rows = _some(parameter.detach(), 0, kept)
        setattr(made, name, nn.Parameter(rows, requires_grad=parameter.requires_grad))
    return made


def _cut_tensor(
    rewriter: GraphRewriter, name: str, dim: int, kept: Sequence[int], done: set[str]
) -> None:
    if name not in done:
        done.add(name)
        rewriter.set_tensor(name, _some(rewriter.get_tensor(name), dim, kept), tied=True)


def _some(tensor: Tensor, dim: int, kept: Sequence[int]) -> Tensor:
    return tensor.index_select(dim, torch.tensor(kept, device=tensor.device))


def check_cut(after: Program, pruned: Iterable[Pruned]) -> None:
    """Check that each mixture has as many experts as stay.

    Raises:
        PassError: One has not.
    """
    there = {each.path: each.experts.experts for each in find_mixtures(after)}
    for each in pruned:
        if there.get(each.path) != len(each.kept):
            raise PassError(
                f"{each.path} has {there.get(each.path)} experts, not {len(each.kept)}",
                where=each.path,
            )
