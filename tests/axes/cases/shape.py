"""Cases of ops that move values: reshapes, permutations, expansions, cuts and joins."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.axes.cases.linear import weight
from tests.axes.support import Built, Case, Net, Sizes, case, tokens

__all__ = ["CASES"]


def _with(s: Sizes, compute: Any, back: int = 0, **parts: Any) -> Built:
    net = Net(
        lambda m, x: m.down(compute(m, m.up(x))),
        up=nn.Linear(s.a, s.b), down=nn.Linear(back or s.b, s.c), **parts,
    )  # fmt: skip
    return net, (torch.randn(3, 5, s.a),)


def _two(s: Sizes, compute: Any, back: int) -> Built:
    """Two linears of widths b and c, joined by an op."""
    net = Net(
        lambda m, x: m.down(compute(m.left(x), m.right(x))),
        left=nn.Linear(s.a, s.b), right=nn.Linear(s.a, s.c), down=nn.Linear(back, 3),
    )  # fmt: skip
    return net, (torch.randn(3, 5, s.a),)


def _split(s: Sizes, cut: Any, width: int, first: int) -> Built:
    """The parts of one linear go separate ways."""

    def forward(m: Any, x: Tensor) -> Tensor:
        parts = cut(m.up(x))
        return m.one(torch.sin(parts[0])) + m.two(torch.tanh(parts[-1]))

    last = cut(torch.zeros(1, 1, width))[-1].shape[-1]
    net = Net(forward, up=nn.Linear(s.a, width), one=nn.Linear(first, 3), two=nn.Linear(last, 3))
    return net, (torch.randn(3, 5, s.a),)


def _by_nodes(s: Sizes) -> Built:
    """A reshape whose sizes are computed in the graph."""

    def compute(m: Any, x: Tensor) -> Tensor:
        return x.view(x.size(0), x.size(1) * x.size(2)).view(x.size(0), x.size(1), x.size(2))

    return _with(s, compute)


def _heads(s: Sizes) -> Built:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.up(x).reshape(-1, 5, 3, s.b).permute(0, 2, 1, 3)
        return m.down(y.transpose(1, 2).flatten(2))

    net = Net(forward, up=nn.Linear(s.a, 3 * s.b), down=nn.Linear(3 * s.b, s.c))
    return net, (torch.randn(3, 5, s.a),)


def _grid(s: Sizes) -> Built:
    def forward(m: Any, x: Tensor) -> Tensor:
        rows, columns = torch.meshgrid(m.u, m.v, indexing="ij")
        return m.down(m.up(x) @ (rows + columns))

    net = Net(forward, up=nn.Linear(s.a, s.b), down=nn.Linear(s.c, 3), u=weight(s.b), v=weight(s.c))
    return net, (torch.randn(3, 5, s.a),)


def _squares(compute: Any) -> Any:
    return lambda s: tokens(lambda x: x @ compute(x.transpose(1, 2) @ x), s)


CASES: tuple[Case, ...] = (
    case("reshape", _by_nodes),
    case("reshape", lambda s: tokens(
        lambda x: x.view(-1, 5, 2, 3).relu().view(x.shape[0], 5, -1), s, 6), "factors"),
    case("view", lambda s: tokens(lambda x: x.view(torch.int32).view(torch.float32) * 2, s),
         "bytes", freezes=True),
    case("reshape permute transpose", _heads),
    case("reshape_as", lambda s: tokens(
        lambda x: x.flatten(1).reshape_as(x), s)),
    case("flatten", lambda s: tokens(lambda x: x.flatten(1).view(-1, 5, x.shape[2]), s)),
    case("ravel", lambda s: tokens(lambda x: x.ravel().view(x.shape), s)),
    case("unflatten", lambda s: tokens(
        lambda x: x.unflatten(2, (3, -1)).relu().flatten(2), s, 3 * s.b)),
    case("unflatten", lambda s: _with(
        s, lambda m, x: m.cut(x.repeat(1, 1, 3)).flatten(2), 3 * s.b,
        cut=nn.Unflatten(2, (3, s.b))), "module"),
    case("squeeze unsqueeze", lambda s: tokens(
        lambda x: x.unsqueeze(1).relu().squeeze(1)[:, None].squeeze(), s)),
    case("t", lambda s: tokens(lambda x: x.flatten(0, 1).t().t().unflatten(0, (-1, 5)), s)),
    case("adjoint", lambda s: tokens(lambda x: x.adjoint().relu().adjoint(), s)),
    case("movedim", lambda s: tokens(lambda x: x.movedim(2, 0).relu().movedim(0, -1), s)),
    case("expand", lambda s: _with(
        s, lambda m, x: x * m.p.expand(x.shape[0], 5, -1), p=weight(s.b))),
    case("expand", lambda s: _with(
        s, lambda m, x: x + m.p.expand(x.shape[0], 5, s.b), p=weight(1, 1, 1)), "sizes"),
    case("expand_as", lambda s: _with(s, lambda m, x: x * m.p.expand_as(x), p=weight(s.b))),
    case("broadcast_to", lambda s: _with(
        s, lambda m, x: x * torch.broadcast_to(m.p, (x.shape[0], 5, s.b)), p=weight(s.b))),
    case("broadcast_tensors", lambda s: _with(
        s, lambda m, x: torch.mul(*torch.broadcast_tensors(x, m.p)), p=weight(s.b))),
    case("repeat", lambda s: tokens(lambda x: x.repeat(1, 1, 3), s, s.b, 3 * s.b)),
    case("repeat", lambda s: tokens(
        lambda x: x.sum(-1, keepdim=True).repeat(1, 1, 4), s, s.b, 4), "of one"),
    case("tile", lambda s: tokens(lambda x: torch.tile(x, (2,)), s, s.b, 2 * s.b)),
    case("repeat_interleave", lambda s: tokens(
        lambda x: x.repeat_interleave(3, 2), s, s.b, 3 * s.b)),
    case("cat", lambda s: _two(s, lambda a, b: torch.cat([a, torch.relu(b), a], -1),
                               2 * s.b + s.c)),
    case("cat", lambda s: tokens(lambda x: torch.cat([x, x.relu()], 1), s), "positions"),
    case("stack", lambda s: tokens(lambda x: torch.stack([x, x.relu(), -x], 2).sum(2), s)),
    case("stack", lambda s: tokens(lambda x: torch.stack([x, x.exp()], -1).flatten(-2), s, s.b,
                                   2 * s.b), "interleaved"),
    case("split", lambda s: _split(s, lambda x: x.split([s.b, s.c], -1), s.b + s.c, s.b)),
    case("split", lambda s: _split(s, lambda x: x.split(s.b, -1), s.b + 2, s.b), "uneven"),
    case("chunk", lambda s: _split(s, lambda x: x.chunk(2, -1), 2 * s.b, s.b)),
    case("chunk", lambda s: tokens(lambda x: torch.mul(*x.chunk(2, -1)), s, 2 * s.b, s.b),
         "gated"),
    case("tensor_split", lambda s: _split(
        s, lambda x: x.tensor_split(2, -1), 2 * s.b + 1, s.b + 1)),
    case("tensor_split", lambda s: _split(
        s, lambda x: x.tensor_split((s.b,), -1), s.b + s.c, s.b), "places"),
    case("unbind", lambda s: tokens(
        lambda x: torch.mul(*x.unflatten(-1, (-1, 2)).unbind(-1)), s, 2 * s.b, s.b)),
    case("unbind", lambda s: tokens(
        lambda x: torch.stack(x.movedim(2, 0).relu().unbind(0), 2), s), "channels",
         inert=True),
    case("roll", lambda s: tokens(lambda x: x.roll(1, 2), s), freezes=True),
    case("roll", lambda s: tokens(lambda x: x.roll(1, 1), s), "positions"),
    case("flip", lambda s: tokens(lambda x: x.flip(2), s), freezes=True),
    case("flip", lambda s: tokens(lambda x: x.flip(1), s), "positions"),
    case("diagonal diag_embed", _squares(
        lambda y: torch.diag_embed(torch.diagonal(y, dim1=1, dim2=2))), freezes=True),
    case("diag", lambda s: _with(s, lambda m, x: x @ torch.diag(m.p), p=weight(s.b)),
         freezes=True),
    case("meshgrid", _grid, freezes=True),
    case("glu", lambda s: tokens(lambda x: F.glu(x), s, 2 * s.b, s.b)),
)  # fmt: skip
