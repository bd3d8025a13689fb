"""A vision transformer for 8 x 8 grey images (Dosovitskiy et al. 2021), pooled by the mean."""

from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Self-attention with queries, keys and values in one layer, `[batch, tokens, width]`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a two-layer perceptron, each after a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """`blocks` blocks on patches of 2 x 2 pixels, with learned positions."""

    def __init__(self, width: int, heads: int, blocks: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.positions = nn.Parameter(nn.init.trunc_normal_(Tensor(1, 16, width), std=0.02))
        self.blocks = nn.Sequential(*(Block(width, heads, 2 * width) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[batch, 1, 8, 8]` to class logits `[batch, classes]`."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.fc(self.norm(self.blocks(tokens)).mean(1))


def vit(width: int = 64, heads: int = 8, blocks: int = 3, classes: int = 10) -> nn.Module:
    """Build the untrained network (102,538 parameters by default); its weights are beside it."""
    return ViT(width, heads, blocks, classes)
