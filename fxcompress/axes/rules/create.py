"""Ops that make tensors: constants take any size, positions do not."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxcompress.axes._site import Rule, Site, Value
from fxcompress.axes._sizes import is_static

__all__ = ["RULES"]


def constant(site: Site) -> Value:
    """A tensor of one value, or of random ones, of given sizes."""
    sizes: Any = site.args.get("size")
    dims = [
        site.solver.fresh(size) if is_static(size) else site.solver.fixed(size, "a dynamic size")
        for size in site.shape()
    ]
    if isinstance(sizes, (tuple, list)) and len(sizes) == len(dims):
        for index, (size, dim) in enumerate(zip(sizes, dims, strict=True)):
            if isinstance(size, (int, fx.Node)):
                site.literal("size", dim, index)
    elif isinstance(sizes, int) and len(dims) == 1:
        site.literal("size", dims[0])
    else:
        for dim in dims:
            site.solver.freeze(dim, "its size is given elsewhere")
    return dims


def like(site: Site) -> Value:
    """The same, of another tensor's sizes."""
    return site.dims("input")


def by_position(site: Site) -> Value:
    """Values that depend on positions."""
    return site.fixed_result("its values depend on positions")


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("zeros", "ones", "empty", "full", "new_zeros", "new_ones", "new_empty", "new_full",
         "rand", "randn"),
        constant,
    ),
    **dict.fromkeys(
        ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like",
         "bernoulli"),
        like,
    ),
    **dict.fromkeys(
        ("arange", "linspace", "logspace", "eye", "scalar_tensor", "tensor", "new_tensor",
         "tril_indices", "triu_indices", "randint", "randperm", "hann_window", "hamming_window"),
        by_position,
    ),
}  # fmt: skip
