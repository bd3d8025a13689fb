"""Random small networks: values are drawn, an op is drawn for them, and the result joins them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.axes.support import Built

Step = Callable[["Grown", list[Tensor]], Tensor]
LENGTH = 4  # positions of a sequence; side of an image


class Grown(nn.Module):
    """Steps over a growing list of values; the last ones are mixed into the output."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.heads = nn.ModuleList()
        self.reads: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step in self.steps:
            values.append(step(self, values))
        parts = [head(values[i]) for head, i in zip(self.heads, self.reads, strict=True)]
        return torch.stack(parts).sum(0)


class Grower:
    """Draws steps. Subclasses are a kind of value and list what can be done with it."""

    place = -1
    """The dimension of the channels."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.net = Grown()
        self.widths = [rng.randint(3, 6)]

    def grow(self, steps: int) -> Built:
        """Return a network of that many steps and its input."""
        first = self.widths[0]
        while len(self.widths) <= steps:
            kinds = [getattr(self, name) for name in sorted(dir(self)) if name.startswith("op_")]
            self.rng.choice(kinds)()
        for i in range(max(1, len(self.widths) - 3), len(self.widths)):
            self.net.heads.append(self.mixer(self.widths[i], 3))
            self.net.reads.append(i)
        return self.net, (self.example(first),)

    def mixer(self, width: int, out: int) -> nn.Module:
        """A linear map of the channels."""
        raise NotImplementedError

    def example(self, width: int) -> Tensor:
        """An input."""
        raise NotImplementedError

    # -- drawing -----------------------------------------------------------------------------------

    def value(self) -> int:
        """One of the values, later ones more often."""
        return max(self.rng.randrange(len(self.widths)) for _ in range(2))

    def part(self, module: nn.Module | nn.Parameter) -> str:
        """Give the network a module or parameter."""
        name = f"part{len(self.widths)}_{len(list(self.net.children()))}"
        while hasattr(self.net, name):
            name += "_"
        setattr(self.net, name, module)
        return name

    def add(self, width: int, step: Step) -> None:
        """Add a step whose result has that many channels."""
        if 2 <= width <= 48:
            self.net.steps.append(step)
            self.widths.append(width)

    def mixed(self, i: int, out: int) -> int:
        """Mix the channels of a value into another number of them."""
        name = self.part(self.mixer(self.widths[i], out))
        self.add(out, lambda m, v: getattr(m, name)(v[i]))
        return len(self.widths) - 1

    # -- what can be done with any channels --------------------------------------------------------

    def op_mix(self) -> None:
        self.mixed(self.value(), self.rng.randint(3, 8))

    def op_activation(self) -> None:
        i = self.value()
        act = self.rng.choice([torch.relu, torch.tanh, F.gelu, torch.sigmoid, torch.abs])
        self.add(self.widths[i], lambda m, v: act(v[i]))

    def op_join(self) -> None:
        """An elementwise op of two values of one width, one of them made so if need be."""
        i, j = self.value(), self.value()
        if self.widths[i] != self.widths[j]:
            j = self.mixed(j, self.widths[i])
        op = self.rng.choice([torch.add, torch.mul, torch.sub, torch.maximum])
        self.add(self.widths[i], lambda m, v: op(v[i], v[j]))

    def op_cat(self) -> None:
        i, j, place = self.value(), self.value(), self.place
        width = self.widths[i] + self.widths[j]
        self.add(width, lambda m, v: torch.cat([v[i], v[j]], place))

    def op_gate(self) -> None:
        i, place = self.value(), self.place
        if self.widths[i] % 2:
            i = self.mixed(i, self.widths[i] + 1)
        self.add(self.widths[i] // 2, lambda m, v: F.glu(v[i], place))

    def op_halves(self) -> None:
        i, place = self.value(), self.place
        count = self.rng.randint(1, self.widths[i] - 1)
        sizes = [count, self.widths[i] - count]
        which = sizes.index(max(sizes))
        self.add(max(sizes), lambda m, v: v[i].split(sizes, place)[which])

    def op_shuffle(self) -> None:
        i, place = self.value(), self.place
        divisors = [d for d in range(2, self.widths[i]) if self.widths[i] % d == 0]
        if divisors:
            outer = self.rng.choice(divisors)
            self.add(self.widths[i], lambda m, v: _turned(v[i], place, outer))

    def op_repeat(self) -> None:
        i, place = self.value(), self.place
        self.add(2 * self.widths[i], lambda m, v: v[i].repeat_interleave(2, place))

    def op_stack(self) -> None:
        i, place = self.value(), self.place
        self.add(
            2 * self.widths[i],
            lambda m, v: _beside(torch.stack([v[i], v[i].tanh()], 2), place),
        )

    def op_softmax(self) -> None:
        i, place = self.value(), self.place
        self.add(self.widths[i], lambda m, v: v[i] * v[i].softmax(place))


def _turned(x: Tensor, place: int, outer: int) -> Tensor:
    place = place % x.dim()
    return x.unflatten(place, (outer, -1)).transpose(place, place + 1).flatten(place, place + 1)


def _beside(x: Tensor, place: int) -> Tensor:
    """Flatten a stacked dimension 2 into the channels."""
    if place == 1:
        return x.flatten(1, 2)
    return x.movedim(2, -1).flatten(-2)


class Sequences(Grower):
    """Values `[batch, positions, channels]`."""

    def mixer(self, width: int, out: int) -> nn.Module:
        return nn.Linear(width, out)

    def example(self, width: int) -> Tensor:
        return torch.randn(3, LENGTH, width)

    def op_norm(self) -> None:
        i = self.value()
        name = self.part(self.rng.choice([nn.LayerNorm, nn.RMSNorm])(self.widths[i]))
        self.add(self.widths[i], lambda m, v: getattr(m, name)(v[i]))

    def op_norm_by_hand(self) -> None:
        i = self.value()
        name = self.part(nn.Parameter(torch.randn(self.widths[i])))
        self.add(self.widths[i], lambda m, v: getattr(m, name) * v[i] * torch.rsqrt(
            v[i].square().mean(-1, keepdim=True) + 1e-2))  # fmt: skip

    def op_product(self) -> None:
        i, out = self.value(), self.rng.randint(3, 7)
        name = self.part(nn.Parameter(torch.randn(self.widths[i], out)))
        ways: list[Any] = [
            lambda x, w: x @ w,
            lambda x, w: torch.einsum("...i,io->...o", x, w),
            lambda x, w: torch.bmm(x, w.expand(x.shape[0], -1, -1)),
        ]
        way = self.rng.choice(ways)
        self.add(out, lambda m, v: way(v[i], getattr(m, name)))

    def op_attention(self) -> None:
        i, heads, wide = self.value(), self.rng.choice([2, 3, 4]), self.rng.choice([3, 4])
        few = self.rng.choice([d for d in (1, 2, heads) if heads % d == 0 and d <= heads])
        width = self.widths[i]
        q, k, v_ = (
            self.part(nn.Linear(width, n * wide)) for n in (heads, few, few)
        )  # fmt: skip

        def step(m: Any, values: list[Tensor]) -> Tensor:
            x = values[i]
            parts = [
                getattr(m, name)(x).unflatten(-1, (n, wide)).transpose(1, 2)
                for name, n in ((q, heads), (k, few), (v_, few))
            ]
            mixed = F.scaled_dot_product_attention(*parts, enable_gqa=few != heads)
            return mixed.transpose(1, 2).reshape(x.shape[0], LENGTH, heads * wide)

        self.add(heads * wide, step)

    def op_gram(self) -> None:
        """Channels attend to channels."""
        i = self.value()
        self.add(
            self.widths[i],
            lambda m, v: v[i] @ (v[i].transpose(1, 2) @ v[i] / LENGTH).softmax(-2),
        )

    def op_recurrent(self) -> None:
        i, hidden = self.value(), self.rng.randint(3, 5)
        both = self.rng.random() < 0.5
        kind: Any = self.rng.choice([nn.GRU, nn.LSTM])
        name = self.part(kind(self.widths[i], hidden, batch_first=True, bidirectional=both))
        self.add(hidden * (1 + both), lambda m, v: getattr(m, name)(v[i])[0])

    def op_roll(self) -> None:
        i = self.value()
        self.add(self.widths[i], lambda m, v: v[i].roll(1, 1).cumsum(1))

    def op_slice(self) -> None:
        i = self.value()
        if self.widths[i] > 3:
            self.add(self.widths[i] - 1, lambda m, v: v[i][..., 1:] * v[i][..., :1])


class Images(Grower):
    """Values `[batch, channels, side, side]`."""

    place = 1

    def mixer(self, width: int, out: int) -> nn.Module:
        return nn.Conv2d(width, out, 1)

    def example(self, width: int) -> Tensor:
        return torch.randn(3, width, LENGTH, LENGTH)

    def op_norm(self) -> None:
        i = self.value()
        width = self.widths[i]
        groups = self.rng.choice([d for d in range(1, width + 1) if width % d == 0])
        norms = [nn.BatchNorm2d(width), nn.GroupNorm(groups, width),
                 nn.InstanceNorm2d(width, affine=True)]  # fmt: skip
        name = self.part(self.rng.choice(norms))
        self.add(width, lambda m, v: getattr(m, name)(v[i]))

    def op_grouped(self) -> None:
        i, each = self.value(), self.rng.randint(1, 3)
        width = self.widths[i]
        groups = self.rng.choice([d for d in range(2, width + 1) if width % d == 0])
        name = self.part(nn.Conv2d(width, groups * each, 3, padding=1, groups=groups))
        self.add(groups * each, lambda m, v: getattr(m, name)(v[i]))

    def op_pool(self) -> None:
        i = self.value()
        pool = self.rng.choice([F.max_pool2d, F.avg_pool2d])
        self.add(self.widths[i], lambda m, v: pool(v[i], 3, stride=1, padding=1))

    def op_excite(self) -> None:
        i = self.value()
        down, up = (self.part(nn.Conv2d(*sizes, 1)) for sizes in
                    ((self.widths[i], 3), (3, self.widths[i])))  # fmt: skip

        def step(m: Any, values: list[Tensor]) -> Tensor:
            x = values[i]
            pooled = x.mean((2, 3), keepdim=True)
            return x * torch.sigmoid(getattr(m, up)(torch.relu(getattr(m, down)(pooled))))

        self.add(self.widths[i], step)

    def op_pixels(self) -> None:
        i = self.value()
        self.add(
            self.widths[i],
            lambda m, v: F.pixel_shuffle(F.pixel_unshuffle(v[i], 2).relu(), 2),
        )

    def op_pad(self) -> None:
        i = self.value()
        self.add(self.widths[i] + 2, lambda m, v: F.pad(v[i], (0, 0, 0, 0, 1, 1)))

    def op_slopes(self) -> None:
        i = self.value()
        name = self.part(nn.PReLU(self.widths[i]))
        self.add(self.widths[i], lambda m, v: getattr(m, name)(v[i]))
