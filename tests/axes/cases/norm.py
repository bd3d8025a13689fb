"""Cases of norms, softmax, reductions, scans and sorting."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.axes.cases.linear import weight
from tests.axes.support import Built, Case, Net, Sizes, case, images, tokens

__all__ = ["CASES"]


def _around(s: Sizes, width: int, compute: Any, **parts: Any) -> Built:
    net = Net(
        lambda m, x: m.down(compute(m, m.up(x))),
        up=nn.Conv2d(s.a, width, 3), down=nn.Conv2d(width, s.c, 1), **parts,
    )  # fmt: skip
    return net, (torch.randn(2, s.a, 5, 5),)


def _normed(s: Sizes, norm: nn.Module, width: int = 0) -> Built:
    return _around(s, width or s.b, lambda m, x: m.norm(x), norm=norm)


def _last(s: Sizes, compute: Any, **parts: Any) -> Built:
    net = Net(
        lambda m, x: m.down(compute(m, m.up(x))),
        up=nn.Linear(s.a, s.b), down=nn.Linear(s.b, s.c), **parts,
    )  # fmt: skip
    return net, (torch.randn(3, 5, s.a),)


def _reduced(s: Sizes, reduce: Any) -> Built:
    """Reduce over the free axis, over positions, and over both, and use all three."""

    def compute(x: Tensor) -> Tensor:
        return x * reduce(x, 2, True) + reduce(x, 1, True) + x * _first(reduce(x, (1, 2), True))

    return tokens(lambda x: compute(_spread(x)), s)


def _spread(x: Tensor) -> Tensor:
    return torch.sigmoid(x) + 0.1


def _first(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value[0]


def _over_one(s: Sizes, reduce: Any) -> Built:
    def compute(x: Tensor) -> Tensor:
        kept = _first(reduce(x, -1, True))
        return x * kept.to(x.dtype) + _first(reduce(x, 1, True)).to(x.dtype)

    return tokens(lambda x: compute(_spread(x)), s)


def _by(op: Any) -> Any:
    return lambda x, dim, keep: op(x, dim=dim, keepdim=keep)


def _truth(op: Any) -> Any:
    return lambda x, dim, keep: op(x > 0.6, dim=dim, keepdim=keep).float() + 1


def _positions(op: Any) -> Built:
    """Positional ops over the sequence, and over the channels of a copy, which freeze."""
    return lambda s: (  # type: ignore[return-value]
        Net(
            lambda m, x: m.down(m.up(x) + op(m.up(x), 1).float() + op(m.side(x), 2).float()),
            up=nn.Linear(s.a, s.b), side=nn.Linear(s.a, s.c), down=nn.Linear(s.b, 3),
        ),
        (torch.randn(3, 5, s.a),),
    )  # fmt: skip


def _index(op: Any) -> Any:
    return _positions(lambda x, dim: op(x, dim=dim, keepdim=True))


def _value(op: Any) -> Any:
    return _positions(lambda x, dim: _first(op(x, dim=dim)).sum(dim, keepdim=True))


def _over_any(name: str) -> Case:
    op = getattr(torch, name)
    return case(name, lambda s: _reduced(s, _by(op)))


def _over_either(name: str) -> Case:
    op = getattr(torch, name)
    return case(name, lambda s: _over_one(s, _by(op)))


def _paired(s: Sizes) -> Built:
    net = Net(
        lambda m, x: m.down(m.up(x)) * F.cosine_similarity(m.up(x), m.side(x), dim=2)[..., None],
        up=nn.Linear(s.a, s.b), side=nn.Linear(s.a, s.b), down=nn.Linear(s.b, s.c),
    )  # fmt: skip
    return net, (torch.randn(3, 5, s.a),)


CASES: tuple[Case, ...] = (
    case("batch_norm", lambda s: _normed(s, nn.BatchNorm2d(s.b))),
    case("batch_norm", lambda s: _normed(s, nn.BatchNorm2d(s.b, track_running_stats=False)),
         "batch"),
    case("instance_norm", lambda s: _normed(s, nn.InstanceNorm2d(s.b, affine=True))),
    case("layer_norm", lambda s: _last(s, lambda m, x: m.norm(x), norm=nn.LayerNorm(s.b))),
    case("layer_norm", lambda s: _last(s, lambda m, x: m.norm(x),
                                       norm=nn.LayerNorm(s.b, elementwise_affine=False)), "plain"),
    case("layer_norm", lambda s: _last(
        s, lambda m, x: F.layer_norm(x, (s.b,), m.w, m.v), w=weight(s.b), v=weight(s.b)),
         "function"),
    case("layer_norm", lambda s: _last(s, lambda m, x: m.norm(x), norm=nn.LayerNorm((5, s.b))),
         "positions"),
    case("rms_norm", lambda s: _last(s, lambda m, x: m.norm(x), norm=nn.RMSNorm(s.b))),
    case("rms_norm", lambda s: _last(s, lambda m, x: F.rms_norm(x, (s.b,), m.w), w=weight(s.b)),
         "function"),
    case("group_norm", lambda s: _normed(s, nn.GroupNorm(3, 3 * s.b), 3 * s.b)),
    case("group_norm", lambda s: _normed(s, nn.GroupNorm(1, s.b)), "one"),
    case("group_norm", lambda s: _around(
        s, 4 * s.b, lambda m, x: F.group_norm(x, 4, m.w, m.v), w=weight(4 * s.b),
        v=weight(4 * s.b)), "function"),
    case("local_response_norm", lambda s: _normed(s, nn.LocalResponseNorm(3)), freezes=True),
    case("normalize", lambda s: _last(s, lambda m, x: F.normalize(x, dim=-1))),
    case("cosine_similarity", _paired),
    case("softmax", lambda s: _last(s, lambda m, x: x.softmax(-1))),
    case("softmax", lambda s: images(lambda x: torch.relu(nn.Softmax2d()(x)), s), "channels"),
    case("softmin", lambda s: _last(s, lambda m, x: F.softmin(x, dim=-1))),
    case("log_softmax", lambda s: _last(s, lambda m, x: F.log_softmax(x, dim=2))),
    *map(_over_any, ("sum", "nansum", "norm", "mean", "nanmean", "amax", "amin", "var", "std",
                     "logsumexp")),
    case("vector_norm", lambda s: _reduced(s, _by(torch.linalg.vector_norm))),
    *map(_over_either, ("prod", "max", "min", "aminmax", "median", "nanmedian", "var_mean",
                        "std_mean")),
    case("any", lambda s: _over_one(s, _truth(torch.any)), control=False),
    case("all", lambda s: _over_one(s, _truth(torch.all)), control=False),
    case("max", lambda s: _last(s, lambda m, x: torch.max(x, x.flip(1))), "two"),
    case("count_nonzero", lambda s: _last(
        s, lambda m, x: x * (1 + torch.count_nonzero(torch.relu(x), dim=2)[..., None])),
         control=False),
    *(case(name, _index(getattr(torch, name)), freezes=True) for name in ("argmax", "argmin")),
    case("mode", _positions(lambda x, dim: torch.mode(x.round(), dim, keepdim=True)[0]),
         freezes=True),
    case("kthvalue", _positions(lambda x, dim: torch.kthvalue(x, 2, dim, keepdim=True)[0]),
         freezes=True),
    case("quantile", _positions(lambda x, dim: torch.quantile(x, 0.3, dim, keepdim=True)),
         freezes=True),
    *(case(name, _value(getattr(torch, name)), freezes=True)
      for name in ("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "sort", "argsort")),
    case("topk", _positions(lambda x, dim: x.topk(2, dim)[0].sum(dim, keepdim=True)), freezes=True),
)  # fmt: skip
