"""Cases of ops that pick or write by position."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.axes.cases.linear import weight
from tests.axes.support import Built, Case, Net, Sizes, case, tokens

__all__ = ["CASES"]

_ORDER = torch.tensor([3, 0, 2, 4, 1])  # of the five positions
_BACK = torch.tensor([2, 0, 1])  # of three channels


def _with(s: Sizes, compute: Any, back: int = 0, **parts: Any) -> Built:
    net = Net(
        lambda m, x: m.down(compute(m, m.up(x))),
        up=nn.Linear(s.a, s.b), down=nn.Linear(back or s.b, s.c), **parts,
    )  # fmt: skip
    return net, (torch.randn(3, 5, s.a),)


def _ordered(compute: Any) -> Any:
    return lambda s: _with(s, compute, order=_ORDER)


def _sliced(s: Sizes, *cuts: Any) -> Built:
    """The slices of one linear go separate ways."""
    width = 2 * s.b + s.c

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.up(x)
        parts = [getattr(m, f"down{i}")(torch.relu(y[..., cut])) for i, cut in enumerate(cuts)]
        return torch.stack(parts).sum(0)

    downs = {f"down{i}": nn.Linear(len(range(width)[cut]), 3) for i, cut in enumerate(cuts)}
    net = Net(forward, up=nn.Linear(s.a, width), **downs)
    return net, (torch.randn(3, 5, s.a),)


def _words(s: Sizes, compute: Any, **parts: Any) -> Built:
    net = Net(
        lambda m, ids: m.down(compute(m, ids)),
        table=nn.Embedding(11, s.b), down=nn.Linear(s.b, s.c), **parts,
    )  # fmt: skip
    return net, (torch.randint(0, 11, (3, 5)),)


CASES: tuple[Case, ...] = (
    case("getitem", lambda s: _sliced(s, slice(0, s.b), slice(s.b, None))),
    case("getitem", lambda s: _sliced(s, slice(None, -s.c), slice(-s.c, None), slice(1, 3)),
         "negative"),
    case("getitem", lambda s: tokens(lambda x: x[..., ::2] * x[..., 1::2], s, 2 * s.b, s.b),
         "interleaved"),
    case("getitem", lambda s: tokens(
        lambda x: x * x[:, :, 1, None] + x[..., -1][:, :, None], s, 3 * s.b), "numbers"),
    case("getitem", lambda s: tokens(lambda x: x[None, :, 1:3].squeeze(0)[:, [0, 1]], s),
         "positions"),
    case("getitem", lambda s: _with(s, lambda m, x: x[:, m.order], order=_ORDER), "tensor"),
    case("getitem", lambda s: _with(s, lambda m, x: x[..., m.order], 3, order=_BACK),
         "channels", freezes=True),
    case("getitem", lambda s: _with(
        s, lambda m, x: (x @ x.transpose(1, 2) + m.table[m.order].view(5, 5, s.c).permute(2, 0, 1)
                         .sum(0)) @ x,
        table=weight(9, s.c), order=torch.arange(25) % 9), "bias table"),
    case("select", lambda s: tokens(lambda x: x * x.select(2, 1)[..., None], s, 2 * s.b)),
    case("narrow", lambda s: tokens(
        lambda x: x.narrow(2, 0, s.b) * x.narrow(2, s.b, s.b), s, 2 * s.b, s.b)),
    case("index_select", _ordered(lambda m, x: x.index_select(1, m.order))),
    case("gather", _ordered(lambda m, x: x.gather(1, m.order[None, :, None].expand(x.shape)))),
    case("take_along_dim", _ordered(
        lambda m, x: torch.take_along_dim(x, m.order[None, :, None].expand(x.shape), 1)),
         plain=True),
    case("scatter", _ordered(
        lambda m, x: x.scatter(1, m.order[None, :, None].expand(x.shape), x.relu()))),
    case("scatter_add", _ordered(
        lambda m, x: x.scatter_add(1, m.order[None, :, None].expand(x.shape), x.relu()))),
    case("scatter_reduce", _ordered(lambda m, x: x.scatter_reduce(
        1, m.order[None, :, None].expand(x.shape), x.relu(), "amax"))),
    case("index_add", _ordered(lambda m, x: x.index_add(1, m.order, x.relu()))),
    case("index_copy", _ordered(lambda m, x: x.index_copy(1, m.order, x.relu() + x))),
    case("index_fill", _ordered(lambda m, x: x.index_fill(1, m.order[:2], 0.5))),
    case("slice_scatter", lambda s: tokens(
        lambda x: torch.slice_scatter(x, x[:, :2].relu(), 1, 1, 3), s)),
    case("select_scatter", lambda s: tokens(
        lambda x: torch.select_scatter(x, x[:, 0].relu(), 1, 2), s)),
    case("embedding", lambda s: _words(s, lambda m, ids: m.table(ids).relu())),
    case("embedding", lambda s: _words(
        s, lambda m, ids: F.embedding(ids, m.more) * m.table(ids), more=weight(11, s.b)),
         "function"),
    case("embedding_bag", lambda s: _words(
        s, lambda m, ids: m.bag(ids) * m.table(ids)[:, 0], bag=nn.EmbeddingBag(11, s.b))),
    case("one_hot", lambda s: _words(
        s, lambda m, ids: F.one_hot(ids, 11).float() @ m.more, more=weight(11, s.b)),
         freezes=True),
    case("take", lambda s: tokens(
        lambda x: torch.take(x, torch.arange(15 * s.b)).view(x.shape), s),
         freezes=True, plain=True),
    case("masked_select", lambda s: tokens(
        lambda x: x * torch.masked_select(x, x > 0).sum(), s), freezes=True),
    case("masked_scatter", lambda s: tokens(
        lambda x: torch.masked_scatter(x, x > 0, x.exp()), s), freezes=True),
    case("nonzero", lambda s: tokens(lambda x: x * torch.nonzero(x > 0).float().sum(), s),
         freezes=True),
    case("argwhere", lambda s: tokens(lambda x: x * torch.argwhere(x > 0).float().sum(), s),
         freezes=True),
    case("index_put", lambda s: tokens(
        lambda x: torch.index_put(x, (torch.tensor([0, 1]),), x[:2].relu()), s), freezes=True),
    case("searchsorted", lambda s: tokens(
        lambda x: x + torch.searchsorted(torch.tensor([-1.0, 0.0, 1.0]), x).float(), s),
         freezes=True),
    case("bucketize", lambda s: tokens(
        lambda x: x + torch.bucketize(x, torch.tensor([-1.0, 0.0, 1.0])).float(), s),
         freezes=True),
)  # fmt: skip
