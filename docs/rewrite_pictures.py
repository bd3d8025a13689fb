"""Draw what each structural pass does to a small model, for docs/passes: `make docs`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress as fxc
from fxcompress.report.pair import render_pair

IMAGES = Path(__file__).with_name("images")
Step = Mapping[str, Any]


class Block(nn.Module):
    """A feed-forward layer around a skip, over `[batch, tokens, 16]`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Blocks(nn.Module):
    """Some blocks and a head."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(count))
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Pooled(Blocks):
    """Two blocks and a head on the mean over tokens: one answer for each sample."""

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


class Mixture(nn.Module):
    """Two of four experts for each token, every expert computed and masked."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4, bias=False)
        self.up = nn.ModuleList(nn.Linear(16, 32, bias=False) for _ in range(4))
        self.down = nn.ModuleList(nn.Linear(32, 16, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        total = torch.zeros_like(x)
        for i, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            share = torch.where(chosen == i, weights, 0.0).sum(-1, keepdim=True)
            total = total + share * down(F.relu(up(x)))
        return total


class Convolutions(nn.Module):
    """Two convolutions and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv, self.head = nn.Conv2d(16, 32, 3, padding=1), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.head(F.silu(self.conv(x)).mean((2, 3)))


class Branches(nn.Module):
    """A 3 × 3 and a 1 × 1 convolution and the identity, each with its norm, added."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.wide_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.point, self.point_norm = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.same_norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        branches = self.wide_norm(self.wide(x)) + self.point_norm(self.point(x))
        return F.relu(branches + self.same_norm(x))


class Words(nn.Module):
    """A table of words and a classifier of their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(200, 32), nn.Linear(32, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens).mean(1))


@dataclass(frozen=True)
class Picture:
    """What is drawn: a model, an input, the passes before, and those that are shown."""

    model: Callable[[], nn.Module]
    example: Callable[[], Tensor]
    steps: Sequence[Step]
    before: Sequence[Step] = ()


def _states() -> Tensor:
    return torch.randn(2, 6, 16)


def _images(channels: int = 3) -> Tensor:
    return torch.randn(2, channels, 8, 8)


def _blocks(count: int, *steps: Step, before: Sequence[Step] = ()) -> Picture:
    return Picture(lambda: Blocks(count), _states, steps, before)


def _mixture(**step: Any) -> Picture:
    return Picture(Mixture, _states, [step], [{"use": "moe.lift"}])


PICTURES: Mapping[str, Picture] = {
    "depth.skip_blocks": _blocks(3, {"use": "depth.skip_blocks", "layers": [1]}),
    "depth.merge_layers": _blocks(3, {"use": "depth.merge_layers", "groups": [[1, 2]]}),
    "depth.share_layers": _blocks(2, {"use": "depth.share_layers", "groups": 2}),
    "depth.stochastic": _blocks(2, {"use": "depth.stochastic"}),
    "depth.early_exit": _blocks(2, {"use": "depth.early_exit", "after": [0], "head": "copy"}),
    "depth.exit_when": Picture(
        Pooled,
        _states,
        [{"use": "depth.exit_when", "thresholds": [0.5]}],
        [{"use": "depth.early_exit", "after": [0], "head": "copy"}],
    ),
    "depth.mixture_of_depths": _blocks(
        2, {"use": "depth.mixture_of_depths", "capacity": 0.5, "layers": [1]}
    ),
    "moe.lift": Picture(Mixture, _states, [{"use": "moe.lift"}]),
    "moe.prune_experts": _mixture(use="moe.prune_experts", count=1, criterion="random"),
    "moe.merge_experts": _mixture(use="moe.merge_experts", experts=2, calibration=2),
    "moe.to_dense": _mixture(use="moe.to_dense", calibration=2),
    "moe.change_top_k": _mixture(use="moe.change_top_k", top_k=1),
    "moe.upcycle": _blocks(1, {"use": "moe.upcycle", "experts": 4, "top_k": 1}),
    "factorize.svd": _blocks(1, {"use": "factorize.svd", "rank": 4, "whiten": "none"}),
    "factorize.tucker": Picture(Convolutions, _images, [{"use": "factorize.tucker", "ratio": 0.5}]),
    "factorize.cp": Picture(Convolutions, _images, [{"use": "factorize.cp", "ratio": 0.25}]),
    "factorize.depthwise": Picture(
        Convolutions,
        _images,
        [{"use": "factorize.depthwise", "multiplier": 1, "whiten": "none"}],
    ),
    "factorize.share_weights": _blocks(1, {"use": "factorize.share_weights", "entries": 16}),
    "factorize.embedding": Picture(
        Words,
        lambda: torch.arange(12).reshape(2, 6),
        [{"use": "factorize.embedding", "rank": 8}],
    ),
    "tidy.fuse": Picture(Branches, lambda: _images(8), [{"use": "tidy.fuse"}]),
    "tidy.fold_batchnorm": Picture(Convolutions, _images, [{"use": "tidy.fold_batchnorm"}]),
    "tidy.replace_activation": Picture(
        Convolutions,
        _images,
        [{"use": "tidy.replace_activation", "replace": {"silu": "hardswish"}}],
    ),
}


def draw(name: str) -> str:
    """Return the picture of a pass."""
    torch.manual_seed(0)
    picture = PICTURES[name]
    example = picture.example()
    program = fxc.capture(picture.model().eval(), (example,))
    data = {"calibration": [(example,)]}
    if picture.before:
        program = fxc.compress(program, list(picture.before), data=data).program
    after = fxc.compress(program, list(picture.steps), data=data).program
    return render_pair(program, after, f"A small model before and after {name}")


def pictures() -> Iterator[tuple[Path, str]]:
    """Yield each picture: where it lies, and its bytes."""
    for name in PICTURES:
        yield IMAGES / f"{name}.svg", draw(name)


if __name__ == "__main__":
    for file, text in pictures():
        file.write_text(text, encoding="utf-8")
