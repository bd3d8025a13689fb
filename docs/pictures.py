"""Draw the pictures of docs/axes.md and docs/distillation.md from small models: `make docs`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress as fxc
from fxcompress.pipeline.figures import Ladder
from fxcompress.report.render import render_ladder, render_rails

IMAGES = Path(__file__).with_name("images")


class Residual(nn.Module):
    """A stem, a block around a skip, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64)
        self.conv2, self.bn2 = nn.Conv2d(64, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


class Attention(nn.Module):
    """One layer of a transformer: attention with one projection for q, k and v, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.norm1, self.qkv, self.proj = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.norm2, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, 4, 8).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.proj(mixed.reshape(batch, length, 32))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


class Stages(nn.Module):
    """Two stages of convolutions, the second at half the size, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(self.stage(3, 32, 1), self.stage(32, 64, 2))
        self.fc = nn.Linear(64, 10)

    @staticmethod
    def stage(before: int, after: int, stride: int) -> nn.Module:
        conv = nn.Conv2d(before, after, 3, stride, padding=1)
        return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stages(x).mean((2, 3)))


def joint_graph() -> str:
    """Return the picture of a pruned model that learns from what it was."""
    program = fxc.capture(Stages().eval(), (torch.randn(2, 3, 8, 8),), name="stages")
    taps = [{"name": "mid", "at": "stages.0"}, {"name": "end", "at": "stages.1"}]
    losses = [{"use": "hard_labels"}, {"use": "soft_labels"}, {"use": "features"}]
    train = {"use": "train.fit", "steps": 1, "teacher": "original", "losses": losses}
    steps = [{"use": "prune.channels", "ratio": 0.5}, {"use": "distill.tap", "taps": taps}, train]
    data = {"train": [((torch.randn(4, 3, 8, 8),), torch.arange(4))]}
    result = fxc.compress(program, steps, data=data)
    (ladder,) = result.record.passes[-1].figures
    assert isinstance(ladder, Ladder)
    return render_ladder(ladder)


def pictures() -> Iterator[tuple[Path, str]]:
    """Yield each picture: where it lies, and its bytes."""
    yield IMAGES / "joint-graph.svg", joint_graph()
    models: dict[str, tuple[nn.Module, Tensor]] = {
        "axes-residual": (Residual(), torch.randn(2, 3, 8, 8)),
        "axes-attention": (Attention(), torch.arange(14).reshape(2, 7)),
    }
    for name, (model, example) in models.items():
        program = fxc.capture(model.eval(), (example,), name=name)
        result = fxc.compress(program, [{"use": "prune.channels", "ratio": 0.5}])
        axes = result.build_report().axes
        assert axes is not None
        assert axes.rails is not None
        yield IMAGES / f"{name}.svg", render_rails(axes.rails)


if __name__ == "__main__":
    torch.manual_seed(0)
    for file, text in pictures():
        file.write_text(text, encoding="utf-8")
