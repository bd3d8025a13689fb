"""Cases of products: convolutions, linear maps, contractions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fxcompress.nn import Experts, OperandExperts, StackQuantize
from tests.axes.support import Built, Case, Net, Sizes, case, tokens

__all__ = ["CASES"]

_CONVS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_UPS: tuple[Any, ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def _convolutions(s: Sizes, rank: int) -> Built:
    conv = _CONVS[rank - 1]
    net = Net(
        lambda m, x: m.last(m.grouped(torch.tanh(m.first(x)))),
        first=conv(s.a, 3 * s.b, 3, stride=2, padding=1),
        grouped=conv(3 * s.b, 3 * s.c, 1, groups=3),
        last=conv(3 * s.c, 2, 1),
    )
    return net, (torch.randn(2, s.a, *[4] * rank),)


def _depthwise(s: Sizes) -> Built:
    net = Net(
        lambda m, x: m.last(m.deep(torch.tanh(m.first(x)))),
        first=nn.Conv2d(s.a, s.b, 1),
        deep=nn.Conv2d(s.b, 2 * s.b, 3, groups=s.b, bias=False),
        last=nn.Conv2d(2 * s.b, s.c, 1),
    )
    return net, (torch.randn(2, s.a, 5, 5),)


def _transposed(s: Sizes, rank: int, groups: int) -> Built:
    conv, up = _CONVS[rank - 1], _UPS[rank - 1]
    net = Net(
        lambda m, x: m.last(torch.tanh(m.up(m.first(x)))),
        first=conv(s.a, groups * s.b, 1),
        up=up(groups * s.b, groups * s.c, 2, stride=2, groups=groups),
        last=conv(groups * s.c, 3, 1),
    )
    return net, (torch.randn(2, s.a, *[3] * rank),)


def _functional_convolution(s: Sizes, transposed: bool) -> Built:
    shape = (s.b, s.c) if transposed else (s.c, s.b)
    net = Net(
        lambda m, x: m.last(
            torch.convolution(
                m.first(x), m.w, m.bias, [1, 1], [1, 1], [1, 1], transposed, [0, 0], 1
            )
        ),
        first=nn.Conv2d(s.a, s.b, 1), last=nn.Conv2d(s.c, 3, 1),
        w=weight(*shape, 3, 3), bias=weight(s.c),
    )  # fmt: skip
    return net, (torch.randn(2, s.a, 4, 4),)


def _between(s: Sizes, compute: Any, back: int = 0, **parts: Any) -> Built:
    """Two linears around a use of free parameters; `b → c` in the middle by default."""
    net = Net(
        lambda m, x: m.down(compute(m, m.up(x))),
        up=nn.Linear(s.a, s.b), down=nn.Linear(back or s.c, 3), **parts,
    )  # fmt: skip
    return net, (torch.randn(3, 5, s.a),)


def _mixture(s: Sizes, **settings: Any) -> Built:
    def compute(m: Any, x: Tensor) -> Tensor:
        weights, indices = m.router(x).softmax(-1).topk(2, -1)
        return m.experts(x, weights, indices)

    parts = {"router": nn.Linear(s.b, 4), "experts": Experts(4, s.b, s.c, **settings)}
    return _between(s, compute, back=s.b, **parts)


def _stack(rows: int, columns: int, group: int | None) -> StackQuantize:
    groups = () if group is None else (-(-columns // group),)
    module = StackQuantize((4, 0, 8, 3), group=group, shape=(4, rows, *groups))
    module.scale.uniform_(0.05, 0.2)
    module.zero_point.random_(1, 7)
    return module


def _quantized_mixture(s: Sizes, group: int | None) -> Built:
    """Scales per row, or of `down` in runs of hidden units."""

    def compute(m: Any, x: Tensor) -> Tensor:
        weights, indices = m.router(x).softmax(-1).topk(2, -1)
        up, down, gate = m.experts.up, m.experts.down, m.experts.gate
        return m.experts(x, weights, indices, m.up_fq(up), m.down_fq(down), m.gate_fq(gate))

    experts = OperandExperts.over(Experts(4, s.b, 3 * (group or s.c)))
    parts: dict[str, nn.Module] = {"router": nn.Linear(s.b, 4), "experts": experts}
    for name in ("gate", "up", "down"):
        rows, columns = getattr(experts, name).shape[1:]
        parts[f"{name}_fq"] = _stack(rows, columns, group if name == "down" else None)
    return _between(s, compute, back=s.b, **parts)


def _bilinear(s: Sizes) -> Built:
    net = Net(
        lambda m, x: m.down(m.both(m.left(x), m.right(x))),
        left=nn.Linear(s.a, s.b), right=nn.Linear(s.a, s.c),
        both=nn.Bilinear(s.b, s.c, 4), down=nn.Linear(4, 3),
    )  # fmt: skip
    return net, (torch.randn(3, 5, s.a),)


def _experts(s: Sizes, product: Any) -> Built:
    """Every expert sees every token; a router weighs them."""

    def forward(m: Any, x: Tensor) -> Tensor:
        shares = m.router(x).softmax(-1)  # [tokens, experts]
        hidden = torch.relu(product(x.expand(m.up.shape[0], -1, -1), m.up))
        each = product(hidden, m.down)  # [experts, tokens, a]
        return (each * shares.t()[..., None]).sum(0)

    net = Net(
        forward, router=nn.Linear(s.a, s.c),
        up=weight(s.c, s.a, s.b), down=weight(s.c, s.b, s.a),
    )  # fmt: skip
    return net, (torch.randn(5, s.a),)


def _weight_norm(s: Sizes, **options: Any) -> Built:
    wrap = parametrizations.weight_norm
    net = Net(
        lambda m, x: m.down(torch.tanh(m.mid(torch.tanh(m.up(x))))),
        up=wrap(nn.Linear(s.a, s.b), **options), mid=wrap(nn.Linear(s.b, s.c), **options),
        down=nn.Linear(s.c, 3),
    )  # fmt: skip
    return net, (torch.randn(3, 5, s.a),)


CASES: tuple[Case, ...] = (
    *(case(f"conv{rank}d", lambda s, r=rank: _convolutions(s, r)) for rank in (1, 2, 3)),
    case("conv2d", _depthwise, "depthwise"),
    *(case(f"conv_transpose{rank}d", lambda s, r=rank: _transposed(s, r, 1)) for rank in (1, 2, 3)),
    case("conv_transpose2d", lambda s: _transposed(s, 2, 3), "grouped"),
    case("convolution", lambda s: _functional_convolution(s, False)),
    case("convolution", lambda s: _functional_convolution(s, True), "transposed"),
    case("linear", lambda s: tokens(torch.relu, s)),
    case("linear", lambda s: _between(s, lambda m, x: F.linear(x, m.w, m.v),
                                      w=weight(s.c, s.b), v=weight(s.c)), "function"),
    case("linear", lambda s: _between(s, lambda m, x: F.linear(x, m.w)[..., None] * m.v,
                                      w=weight(s.b), v=weight(s.c)), "vector"),
    case("bilinear", _bilinear),
    case("addmm", lambda s: _between(
        s, lambda m, x: torch.addmm(m.v, x.flatten(0, 1), m.w).unflatten(0, (-1, 5)),
        w=weight(s.b, s.c), v=weight(s.c))),
    case("baddbmm", lambda s: _between(
        s, lambda m, x: torch.baddbmm(m.v, x, x.transpose(1, 2) @ (x @ m.w)),
        w=weight(s.b, s.c), v=weight(1, 1, s.c))),
    case("matmul", lambda s: _between(s, lambda m, x: torch.relu(x) @ m.w, w=weight(s.b, s.c))),
    case("matmul", lambda s: _between(
        s, lambda m, x: (x.transpose(1, 2) @ (x @ m.w)).softmax(-1), w=weight(s.b, s.c)), "gram"),
    case("matmul", lambda s: _between(s, lambda m, x: (m.u @ x.transpose(1, 2))[..., None] * m.v,
                                      u=weight(s.b), v=weight(s.c)), "vector"),
    case("mm", lambda s: _between(
        s, lambda m, x: torch.mm(x.flatten(0, 1), m.w).reshape(-1, 5, s.c), w=weight(s.b, s.c))),
    case("mv dot", lambda s: _between(
        s, lambda m, x: x * torch.dot(x[0, 0], m.w) + torch.mv(x[1], m.w)[:, None],
        s.b, w=weight(s.b))),
    case("bmm", lambda s: _experts(s, torch.bmm)),
    case("einsum", lambda s: _experts(s, lambda x, w: torch.einsum("etc,ecd->etd", x, w))),
    case("einsum", lambda s: _between(
        s, lambda m, x: torch.einsum("...i,oi->...o", x, m.w), w=weight(s.c, s.b)), "ellipsis"),
    case("einsum", lambda s: _between(
        s, lambda m, x: torch.einsum("bti,bti,io", x, x, m.w), w=weight(s.b, s.c)), "implicit"),
    case("inner", lambda s: _between(
        s, lambda m, x: torch.inner(x, m.w), w=weight(s.c, s.b))),
    case("outer", lambda s: _between(
        s, lambda m, x: x @ torch.outer(m.u, m.v), u=weight(s.b), v=weight(s.c))),
    case("tensordot", lambda s: _between(
        s, lambda m, x: torch.tensordot(x, m.w, 1), w=weight(s.b, s.c))),
    case("tensordot", lambda s: _between(
        s, lambda m, x: torch.tensordot(x, m.w, ([2], [1])), w=weight(s.c, s.b)), "named"),
    case("experts", _mixture),
    case("experts", lambda s: _mixture(
        s, activation="sigmoid", gated=False, biases=("up", "down")), "no gate"),
    case("experts", lambda s: _mixture(
        s, activation="clamped_swiglu", biases=("gate", "up")), "clamped"),
    case("experts stack_quant", lambda s: _quantized_mixture(s, None), "quantized"),
    case("stack_quant", lambda s: _quantized_mixture(s, 4), "groups"),
    case("weight_norm", _weight_norm),
    case("weight_norm", lambda s: _weight_norm(s, dim=1), "columns"),
)  # fmt: skip
