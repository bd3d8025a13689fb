"""Ops that pick or write values by data: what is picked from cannot shrink."""

from __future__ import annotations

from fxcompress.axes._site import Rule, Site, Value
from fxcompress.axes._solver import Dim

__all__ = ["RULES"]

_BY_DATA = "values are picked from it by data"


def index_select(site: Site) -> Value:
    """Pick indices of one dimension."""
    dims = site.dims("input")
    place = site.axis(site.args["dim"], len(dims))
    site.solver.freeze(dims[place], _BY_DATA)
    return site.rest(
        site.node.meta["val"], {i: d for i, d in enumerate(dims) if i != place}, _BY_DATA
    )


def gather(site: Site) -> Value:
    """Pick along one dimension; the others of operand and index go together."""
    dims, index = site.dims("input"), site.dims("index")
    place = site.axis(site.args.get("dim", 0), len(dims))
    site.solver.freeze(dims[place], _BY_DATA)
    for i, (mine, other) in enumerate(zip(dims, index, strict=True)):
        if i != place:
            _together(site, mine, other)
    return index


def _together(site: Site, left: Dim, right: Dim) -> None:
    if site.solver.size(left) == site.solver.size(right):
        site.solver.unify(left, right)
    else:
        site.solver.freeze(left, "only a part of it is picked")
        site.solver.freeze(right, "only a part of it is picked")


def scatter(site: Site) -> Value:
    """Write along one dimension; the others of operand, index and source go together."""
    return _written(site, site.dims("index"), site.dims("src"))


def index_write(site: Site) -> Value:
    """Write rows of one dimension."""
    return _written(site, site.dims("source"))


def _written(site: Site, *others: list[Dim]) -> list[Dim]:
    dims = site.dims("input")
    place = site.axis(site.args["dim"], len(dims))
    site.solver.freeze(dims[place], "values are written to it by data")
    for other in filter(None, others):
        for i, (dim, its) in enumerate(zip(dims, other, strict=True)):
            if i == place:
                site.solver.freeze(its, "it is written elsewhere by data")
            else:
                _together(site, dim, its)
    return dims


def embedding(site: Site) -> Value:
    """A row of the table for each index."""
    table = site.weight("weight")
    assert table is not None
    site.solver.freeze(table[0], "rows are looked up by data")
    site.role("weight", 1, "out")
    site.solver.tag(table[1], "embedding")
    site.attribute("embedding_dim", table[1])
    return [*site.dims("input"), table[1]]


def embedding_bag(site: Site) -> Value:
    """A sum or mean of rows."""
    table = site.weight("weight")
    assert table is not None
    site.solver.freeze(table[0], "rows are looked up by data")
    site.attribute("embedding_dim", table[1])
    site.solver.tag(table[1], "embedding")
    return site.rest(site.node.meta["val"], {1: table[1]}, "bags of rows")


def one_hot(site: Site) -> Value:
    """A new dimension, indexed by data."""
    return [*site.dims("input"), site.solver.fixed(site.shape()[-1], "it is indexed by data")]


def by_position(site: Site) -> Value:
    """What depends on positions by data: nothing of it can shrink."""
    site.freeze_all(_BY_DATA)
    return site.fixed_result(_BY_DATA)


def slice_scatter(site: Site) -> Value:
    """Write a range of a dimension."""
    dims, source = site.dims("input"), site.dims("src")
    place = site.axis(site.get("dim", 0), len(dims))
    site.solver.freeze(dims[place], "a part of it is written")
    offset = 0 if len(source) == len(dims) else 1
    for i, dim in enumerate(dims):
        if i != place and source:
            site.solver.unify(dim, source[i - (offset if i > place else 0)])
    if offset == 0 and source:
        site.solver.freeze(source[place], "it is written into a larger tensor")
    return dims


RULES: dict[str, Rule] = {
    "index_select": index_select,
    "gather": gather,
    "take_along_dim": gather,
    "scatter": scatter,
    "scatter_add": scatter,
    "scatter_reduce": scatter,
    "index_add": index_write,
    "index_copy": index_write,
    "index_fill": index_write,
    "slice_scatter": slice_scatter,
    "select_scatter": slice_scatter,
    "embedding": embedding,
    "embedding_bag": embedding_bag,
    "one_hot": one_hot,
    **dict.fromkeys(
        ("take", "masked_select", "masked_scatter", "nonzero", "argwhere", "index_put", "index",
         "searchsorted", "bucketize"),
        by_position,
    ),
}  # fmt: skip
