"""Small models with what makes emitting hard: residuals, masks, ties, several outputs."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.ir import Program, capture


class Block(nn.Module):
    """A residual block, with a shortcut where the shape changes."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = None
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ConvNet(nn.Module):
    """Two stages of blocks, two outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.stages = nn.Sequential(Block(8, 8), Block(8, 8), Block(8, 16, 2), Block(16, 16))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stages(F.relu(self.stem(x)))
        pooled = self.pool(x).flatten(1)
        return {"logits": self.fc(pooled), "pooled": pooled}


class Attention(nn.Module):
    """Self-attention with a mask of `[batch, seq]`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.dropout = 0.1

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, seq, width = x.shape

        def split(t: Tensor) -> Tensor:
            return t.view(batch, seq, self.heads, width // self.heads).transpose(1, 2)

        query, key, value = split(self.query(x)), split(self.key(x)), split(self.value(x))
        rate = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, mask[:, None, None, :], rate)
        return self.out(y.transpose(1, 2).reshape(batch, seq, width))


class Layer(nn.Module):
    """A transformer layer, norm first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class LanguageModel(nn.Module):
    """Token ids and a mask by keyword; output embedding tied to the input's."""

    def __init__(self, vocabulary: int = 50, width: int = 32, layers: int = 3) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(16, width) * 0.02)
        self.layers = nn.ModuleList(Layer(width, 4) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor, *, attention_mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        mask = attention_mask.bool()
        for layer in self.layers:
            x = layer(x, mask)
        x = self.norm(x)
        return self.head(x), {"last": x, "mean": x.mean(1)}


def seeded(model: nn.Module) -> Any:
    """Return the model in eval mode with random weights and batch norm statistics."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            scale = 0.3 if tensor.dim() > 1 else 0.1
            offset = 1.0 if "norm" in name or "bn" in name or "running_var" in name else 0.0
            tensor.copy_(noise.abs() + 0.5 if "running_var" in name else noise * scale + offset)
    return model.eval()


def conv_net() -> Program:
    return capture(seeded(ConvNet()), (torch.zeros(2, 3, 16, 16),), name="ConvNet")


def language_model() -> Program:
    ids, mask = torch.zeros(2, 7, dtype=torch.int64), torch.ones(2, 7, dtype=torch.int64)
    sizes = {0: "batch", 1: "seq"}
    return capture(
        seeded(LanguageModel()),
        (ids,),
        {"attention_mask": mask},
        dynamic={"ids": sizes, "attention_mask": sizes},
        name="LanguageModel",
    )
