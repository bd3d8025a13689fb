"""A causal transformer of characters with rotary positions (Su et al., 2021), pre-norm."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

WINDOW = 128
CHARACTERS = 63
HERE = Path(__file__).parent


class Block(nn.Module):
    """Attention and a two-layer perceptron, each after a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = turned(q, turns), turned(k, turns)
        made = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(made.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate pairs of features by angles whose cosines and sines are `[2, window, width / 2]`."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = turns.to(x.dtype).unbind(0)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Characters(nn.Module):
    """Map characters `[batch, 128]` to logits `[batch, 128, CHARACTERS]` of what follows each."""

    def __init__(self, width: int = 256, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.characters = nn.Embedding(CHARACTERS, width)
        half = width // heads // 2
        angles = torch.arange(WINDOW)[:, None] * 10_000 ** (-torch.arange(half) / half)
        self.register_buffer("turns", torch.stack([angles.cos(), angles.sin()]), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, CHARACTERS)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.characters(input_ids)
        for block in self.blocks:
            hidden = block(hidden, self.turns)
        return self.lm_head(self.norm(hidden))


def characters() -> nn.Module:
    """Build the trained model (2.4 M parameters); its weights are kept in half precision."""
    model = Characters()
    model.load_state_dict(load_file(HERE / "characters.safetensors"))
    return model
