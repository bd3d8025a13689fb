"""Causal language models in the manner of Llama: RMSNorm, rotary places, SwiGLU."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 96


class Norm(nn.Module):
    """Root mean square norm over the last dimension."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


class Attention(nn.Module):
    """Causal self-attention with rotary places, `[batch, seq, width]` to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.o = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        batch, seq, width = x.shape
        q, k, v = (
            project(x).view(batch, seq, self.heads, self.head_width).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o(read.transpose(1, 2).reshape(batch, seq, width))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of `x` `[..., seq, width]` by the angles of their places."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Feedforward(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """Attention and a feed-forward net, each behind a norm and around a residual."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = Norm(width), Attention(width, heads)
        self.norm2, self.feedforward = Norm(width), Feedforward(width, hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), cos, sin, mask)
        return x + self.feedforward(self.norm2(x))


class Caller(nn.Module):
    """A causal language model whose output layer is its embedding."""

    def __init__(self, width: int, hidden: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.layers = nn.ModuleList(Layer(width, hidden, heads) for _ in range(layers))
        self.norm = Norm(width)
        half = width // heads // 2
        turns = 1000.0 ** (-torch.arange(half) / half)
        self.register_buffer("turns", turns.repeat(2), persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map tokens `[batch, seq]` and their mask to logits `[batch, seq, VOCABULARY]`."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        angles = places[:, None] * self.turns
        seen = (places[:, None] >= places)[None, None]
        # The first token is never padding, so that no row of the softmax is empty.
        mask = seen & attention_mask[:, None, None].bool()
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin(), mask)
        return F.linear(self.norm(x), self.embedding.weight)


def teacher() -> nn.Module:
    """Build the untrained teacher; its weights are beside this file."""
    return Caller(width=192, hidden=384, layers=8, heads=6)


def student() -> nn.Module:
    """Build an untrained student of 2 layers, with 6 % of the teacher's parameters."""
    return Caller(width=96, hidden=160, layers=2, heads=3)
