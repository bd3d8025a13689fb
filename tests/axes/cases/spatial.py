"""Cases of pooling, resampling, padding, windows and shuffles."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.axes.support import Built, Case, Net, Sizes, case, images

__all__ = ["CASES"]


def _pool(kind: str, rank: int, *args: Any, **options: Any) -> Case:
    name = f"{kind}{rank}d"
    op = getattr(F, name)
    return case(name, lambda s: images(lambda x: op(x, *args, **options), s, rank=rank))


def _unpool(rank: int) -> Case:
    down, up = getattr(F, f"max_pool{rank}d"), getattr(F, f"max_unpool{rank}d")

    def compute(x: Tensor) -> Tensor:
        values, index = down(x, 2, return_indices=True)
        return up(values, index, 2)

    return case(f"max_unpool{rank}d", lambda s: images(compute, s, rank=rank))


def _fractional(rank: int) -> Case:
    op = getattr(F, f"fractional_max_pool{rank}d")

    def build(s: Sizes) -> Built:
        places = torch.rand(2, s.b, rank)
        net = Net(
            lambda m, x: m.down(op(m.up(x), 2, output_size=3, _random_samples=m.places)),
            up=(nn.Conv2d, nn.Conv3d)[rank - 2](s.a, s.b, 1),
            down=(nn.Conv2d, nn.Conv3d)[rank - 2](s.b, s.c, 1),
            places=places,
        )
        return net, (torch.randn(2, s.a, *[6] * rank),)

    return case(f"fractional_max_pool{rank}d", build, plain=True)


def _grid(s: Sizes) -> Built:
    def forward(m: Any, x: Tensor) -> Tensor:
        where = F.affine_grid(
            m.theta(x.mean((2, 3))).view(-1, 2, 3), [x.shape[0], s.b, 4, 4], False
        )
        return m.down(F.grid_sample(m.up(x), where, align_corners=False))

    net = Net(
        forward, up=nn.Conv2d(s.a, s.b, 1), theta=nn.Linear(s.a, 6), down=nn.Conv2d(s.b, s.c, 1)
    )
    return net, (torch.randn(2, s.a, 6, 6),)


def _shortcut(s: Sizes) -> Built:
    """ResNet's option A: fewer positions, and zeros for the channels that are new."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.relu(m.first(x))
        short = F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 1, s.c - 1))
        return m.last(torch.relu(m.second(y) + short))

    net = Net(
        forward,
        first=nn.Conv2d(s.a, s.b, 1), second=nn.Conv2d(s.b, s.b + s.c, 1, stride=2),
        last=nn.Conv2d(s.b + s.c, 3, 1),
    )  # fmt: skip
    return net, (torch.randn(2, s.a, 6, 6),)


CASES: tuple[Case, ...] = (
    *(_pool(kind, rank, 2) for kind in ("max_pool", "avg_pool", "adaptive_avg_pool",
                                       "adaptive_max_pool") for rank in (1, 2, 3)),
    *(_pool("lp_pool", rank, 2.0, 2) for rank in (1, 2, 3)),
    *map(_unpool, (1, 2, 3)),
    *map(_fractional, (2, 3)),
    *(case("interpolate", lambda s, m=mode: images(
        lambda x: F.interpolate(x, scale_factor=2, mode=m), s), mode)
      for mode in ("nearest", "bilinear")),
    case("interpolate", lambda s: images(lambda x: F.interpolate(x, size=(4, 9)), s), "size"),
    case("grid_sample", _grid),
    case("affine_grid", _grid, freezes=True),
    case("pad", lambda s: images(lambda x: F.pad(x, (1, 0, 2, 1)), s)),
    case("pad", lambda s: images(lambda x: F.pad(x, (1, 1), mode="reflect"), s, rank=1), "reflect"),
    case("pad", lambda s: images(lambda x: nn.ReplicationPad2d(1)(x), s), "module"),
    case("pad", _shortcut, "shortcut"),
    case("pad", lambda s: images(lambda x: F.pad(x, (0, 0, 0, 0, -1, 0)), s, s.b + 1, s.b), "crop",
         freezes=True),
    case("pixel_shuffle", lambda s: images(lambda x: F.pixel_shuffle(x, 2), s, 4 * s.b, s.b)),
    case("pixel_unshuffle", lambda s: images(lambda x: F.pixel_unshuffle(x, 2), s, s.b, 4 * s.b)),
    case("channel_shuffle", lambda s: images(lambda x: F.channel_shuffle(x, 3), s, 3 * s.b)),
    case("unfold", lambda s: images(
        lambda x: F.unfold(x, 3, padding=1).unflatten(-1, (6, 6)), s, s.b, 9 * s.b)),
    case("fold", lambda s: images(
        lambda x: F.fold(x.flatten(2)[..., :25], (6, 6), 2), s, 4 * s.b, s.b)),
    case("window", lambda s: images(lambda x: x.unfold(2, 3, 1).sum(-1), s)),
)  # fmt: skip
