"""Cases of ops that act on each element at its place."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.nn import (
    Binarize,
    Codebook,
    DynamicQuantize,
    Exit,
    FakeQuantize,
    FloatQuantize,
    LayerDrop,
    Mask,
    RouteGradient,
    StochasticDepth,
    Tap,
)
from tests.axes.support import Built, Case, Net, Sizes, case, tokens

__all__ = ["CASES"]

_ANY = (
    "abs asinh atan ceil cos cosh deg2rad erf erfc exp exp2 expm1 floor frac i0 neg "
    "rad2deg sgn sign sin sinc sinh square tan trunc round relu tanh sigmoid "
    "detach selu celu nan_to_num angle"
)
_UNIT = "acos asin atanh digamma erfinv lgamma log log10 log1p log2 reciprocal rsqrt sqrt logit"
_F = (
    "relu6 leaky_relu elu gelu silu mish hardsigmoid hardswish hardtanh softplus softsign "
    "softshrink hardshrink tanhshrink logsigmoid rrelu"
)
_TRUTH = "isfinite isinf isnan isneginf isposinf logical_not signbit"
_DROPOUTS = {
    "dropout": nn.Dropout, "alpha_dropout": nn.AlphaDropout, 
    "dropout2d": nn.Dropout2d, "dropout3d": nn.Dropout3d,
    "feature_alpha_dropout": nn.FeatureAlphaDropout,
}  # fmt: skip
_BLIND = ("isinf", "isnan", "isneginf", "isposinf", "logical_not")  # always False here
_BINARY = (
    "add sub mul rsub atan2 copysign fmax fmin logaddexp logaddexp2 hypot maximum minimum "
    "heaviside ldexp nextafter"
)
_COMPARE = "lt le gt ge"
_TWO_VALUED = "eq ne isclose logical_and logical_or logical_xor"
_WHOLE = "bitwise_and bitwise_or bitwise_xor gcd lcm"


def _unary(name: str, source: Any = torch, before: Any = None) -> Case:
    op = getattr(source, name)

    def compute(x: Tensor) -> Tensor:
        y = op(x if before is None else before(x))
        return y if y.dtype == torch.float32 else x * y

    def build(s: Sizes) -> Built:
        return tokens(compute, s)

    return case(name, build, control=name not in _BLIND, plain=True)


def _pair(compute: Any, s: Sizes, before: Any = None) -> Built:
    """Two linears of one input, put together by an op."""

    def forward(m: Any, x: Tensor) -> Tensor:
        left, right = m.left(x), m.right(x)
        if before is not None:
            left, right = before(left), before(right)
        made = compute(left, right)
        return m.down(
            made if made.dtype == torch.float32 else made.float() * (left + right).float()
        )

    net = Net(
        forward,
        left=nn.Linear(s.a, s.b), right=nn.Linear(s.a, s.b), down=nn.Linear(s.b, s.c),
    )  # fmt: skip
    return net, (torch.randn(3, 5, s.a),)


def _whole(x: Tensor) -> Tensor:
    return (x * 8).to(torch.int32)


def _counts(x: Tensor) -> Tensor:
    return (x * 4).round().abs() + 1


def _small(x: Tensor) -> Tensor:
    return (x * 2).abs().to(torch.int32).clamp(0, 3)


def _parameter(compute: Any, s: Sizes, **parts: Any) -> Built:
    net = Net(
        lambda m, x: m.down(compute(m, m.up(x))),
        up=nn.Linear(s.a, s.b), down=nn.Linear(s.b, s.c), **parts,
    )  # fmt: skip
    return net, (torch.randn(3, 5, s.a),)


def _row(s: Sizes) -> nn.Parameter:
    return nn.Parameter(torch.randn(s.b))


def _masked(size: int) -> Mask:
    module = Mask((size,))
    module.mask[1] = False
    return module


def _quantizer(*shape: int, **options: Any) -> FakeQuantize:
    module = FakeQuantize(8, shape=shape, **options)
    module.scale.copy_(torch.rand(shape) * 0.02 + 0.01)
    return module


def _quantized(s: Sizes, group: int | None) -> Built:
    """Weights per output channel, or in runs of it; activations per tensor and per channel."""
    width = 3 * (group or s.b)
    shape = (s.c,) if group is None else (s.c, 3)
    net = Net(
        lambda m, x: m.down(m.each(m.all(F.linear(torch.tanh(m.up(x)), m.rows(m.w))))),
        up=nn.Linear(s.a, width), down=nn.Linear(s.c, 3), w=nn.Parameter(torch.randn(s.c, width)),
        rows=_quantizer(*shape, axis=0, group=group), all=_quantizer(),
        each=_quantizer(s.c, axis=2),
    )  # fmt: skip
    return net, (torch.randn(3, 5, s.a),)


def _codebook(s: Sizes) -> Built:
    """A middle layer's weight is read through it: nothing of that weight may go."""
    net = Net(
        lambda m, x: m.down(torch.tanh(F.linear(m.up(x), m.book(m.w)))),
        up=nn.Linear(s.a, s.a), book=Codebook(4), w=nn.Parameter(torch.randn(s.b, s.a)),
        down=nn.Linear(s.b, s.c),
    )  # fmt: skip
    return net, (torch.randn(3, 5, s.a),)


def _exit(s: Sizes) -> Built:
    """Two heads of one input, and what chooses between their answers."""
    net = Net(
        lambda m, x: m.down(m.exit(m.early(x), m.late(x))),
        early=nn.Linear(s.a, s.b), late=nn.Linear(s.a, s.b), down=nn.Linear(s.b, s.c),
        exit=Exit("exit_0", 0.5),
    )  # fmt: skip
    return net, (torch.randn(3, s.a),)


def _binarized(s: Sizes, *, tracking: bool) -> Built:
    """The last layer's weight and an activation; only the latter lies between what is pruned."""
    rows = Binarize(axis=0, tracking=True)
    if not tracking:
        rows = Binarize(axis=0, shape=(s.b,))
        assert rows.scale is not None
        rows.scale.copy_(torch.rand(s.b) + 0.5)
    net = Net(
        lambda m, x: m.down(torch.tanh(F.linear(m.sign(x), m.rows(m.w)))),
        sign=Binarize(), rows=rows, w=nn.Parameter(torch.randn(s.b, s.a)), down=nn.Linear(s.b, s.c),
    )  # fmt: skip
    return net, (torch.randn(3, 5, s.a),)


def _of_float8(s: Sizes) -> Built:
    rows = FloatQuantize("e5m2", axis=0, shape=(s.b,))
    rows.scale.copy_(torch.rand(s.b) * 0.02 + 0.01)
    net = Net(
        lambda m, x: m.down(m.all(torch.tanh(F.linear(torch.tanh(m.up(x)), m.rows(m.w))))),
        up=nn.Linear(s.a, s.c), down=nn.Linear(s.b, s.c), w=nn.Parameter(torch.randn(s.b, s.c)),
        rows=rows, all=FloatQuantize(),
    )  # fmt: skip
    return net, (torch.randn(3, 5, s.a),)


def _binary(name: str, before: Any = None) -> Case:
    op = getattr(torch, name)
    return case(name, lambda s: _pair(op, s, before), plain=True)


def _of_unit(name: str) -> Case:
    return _unary(name, before=lambda x: torch.sigmoid(x) * 0.9 + 0.05)


CASES: tuple[Case, ...] = (
    *map(_unary, _ANY.split()),
    *map(_unary, _TRUTH.split()),
    *map(_of_unit, _UNIT.split()),
    *(_unary(name, F) for name in _F.split()),
    *map(_binary, (*_BINARY.split(), *_COMPARE.split())),
    *(_binary(name, lambda x: (x > 0).float()) for name in _TWO_VALUED.split()),
    *(_binary(name, _whole) for name in _WHOLE.split()),
    *(_binary(name, torch.exp) for name in ("xlogy", "div")),
    *(_binary(name, _counts) for name in ("fmod", "remainder", "floor_divide")),
    *(_binary(name, torch.sigmoid) for name in ("pow", "float_power")),
    *(_binary(name, _small) for name in ("bitwise_left_shift", "bitwise_right_shift")),
    case("acosh", lambda s: tokens(lambda x: torch.acosh(1.1 + torch.sigmoid(x)), s)),
    case("bitwise_not", lambda s: tokens(lambda x: (~_whole(x)).float(), s)),
    case("clamp", lambda s: tokens(lambda x: torch.clamp(x, -0.5, 0.5), s)),
    case("clamp_min", lambda s: tokens(lambda x: torch.clamp_min(x, -0.2), s)),
    case("clamp_max", lambda s: tokens(lambda x: torch.clamp_max(x, 0.2), s)),
    case("threshold", lambda s: tokens(lambda x: F.threshold(x, 0.1, 0.3), s)),
    *(case(name, lambda s, make=make: _parameter(
        lambda m, x: m.drop(x.unflatten(-1, (-1, 1)).movedim(2, 1))[..., 0].movedim(1, 2),
        s, drop=make())) for name, make in _DROPOUTS.items()),
    case("dropout1d", lambda s: _parameter(lambda m, x: m.drop(x), s, drop=nn.Dropout1d())),
    case("alias", lambda s: tokens(lambda x: torch.ops.aten.alias(x), s)),
    case("mask", lambda s: (Net(
        lambda m, x: m.down(m.up(x) * m.mask(m.gain)),
        up=nn.Linear(s.a, s.b), down=nn.Linear(s.b, s.c), gain=_row(s),
        mask=_masked(s.b)), (torch.randn(3, 5, s.a),)), control=False),
    case("fake_quant", lambda s: _quantized(s, None)),
    case("fake_quant", lambda s: _quantized(s, 4), "groups"),
    case("dynamic_quant", lambda s: _parameter(lambda m, x: m.fq(x), s, fq=DynamicQuantize(8))),
    case("dynamic_quant", lambda s: _parameter(
        lambda m, x: m.fq(x), s, fq=DynamicQuantize(4, per="tensor", symmetric=True)), "tensor"),
    case("binarize", lambda s: _binarized(s, tracking=False)),
    case("codebook", _codebook, freezes=True),
    case("binarize", lambda s: _binarized(s, tracking=True), "tracking"),
    case("float_quant", _of_float8),
    case("tap", lambda s: _parameter(lambda m, x: m.tap(x), s, tap=Tap("hidden"))),
    case("stochastic_depth", lambda s: _parameter(
        lambda m, x: m.path(x), s, path=StochasticDepth(0.5, "row"))),
    case("layer_drop", lambda s: _parameter(
        lambda m, x: m.drop(x, torch.tanh(x)), s, drop=LayerDrop(0.5, "row"))),
    case("route_gradient", lambda s: _parameter(
        lambda m, x: m.route(x.mean(-1, keepdim=True), x, torch.tanh(x)), s,
        route=RouteGradient())),
    case("exit", _exit, freezes=True),
    case("to", lambda s: tokens(lambda x: x.double().to(torch.float32), s)),
    case("addcmul", lambda s: _parameter(
        lambda m, x: torch.addcmul(x, m.p, m.q, value=0.5), s, p=_row(s), q=_row(s))),
    case("addcdiv", lambda s: _parameter(
        lambda m, x: torch.addcdiv(x, m.p, m.q.exp(), value=0.5), s, p=_row(s), q=_row(s))),
    case("lerp", lambda s: _parameter(
        lambda m, x: torch.lerp(x, m.p, m.q), s, p=_row(s), q=_row(s))),
    case("where", lambda s: _parameter(
        lambda m, x: torch.where(x > 0, m.p, x), s, p=_row(s))),
    case("masked_fill", lambda s: _pair(lambda a, b: a.masked_fill(b > 0, 0.25), s)),
    case("isin", lambda s: tokens(
        lambda x: x * torch.isin(x.round(), torch.tensor([0.0, 1.0])), s)),
    case("prelu", lambda s: _parameter(
        lambda m, x: m.act(x.transpose(1, 2)).transpose(1, 2), s, act=nn.PReLU(s.b))),
    case("prelu", lambda s: _parameter(lambda m, x: m.act(x), s, act=nn.PReLU()), "shared"),
    case("prelu", lambda s: _parameter(
        lambda m, x: F.prelu(x.transpose(1, 2), m.p).transpose(1, 2), s, p=_row(s)), "function"),
    case("polar complex imag", lambda s: _pair(
        lambda a, b: (torch.polar(a.exp(), b) * torch.complex(a, b)).imag, s)),
    case("view_as_real view_as_complex", lambda s: tokens(
        lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)))).flatten(-2),
        s, 2 * s.b), freezes=True),
    case("tril", lambda s: tokens(lambda x: torch.tril(x), s), freezes=True),
    case("triu", lambda s: tokens(lambda x: torch.triu(x, -1), s), freezes=True),
)  # fmt: skip
