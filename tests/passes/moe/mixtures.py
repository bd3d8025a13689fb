"""Small mixtures of experts, in the spellings that people write."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HIDDEN, EXPERTS, K = 8, 6, 4, 2


class Feed(nn.Module):
    """A gated feed-forward layer."""

    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, HIDDEN, bias=bias)
        self.up = nn.Linear(WIDTH, HIDDEN, bias=bias)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Plain(nn.Module):
    """One without a gate, its activation spelled out."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.down(y * torch.sigmoid(y))


class Mixture(nn.Module):
    """Router, experts by `mix`, and a residual; `[batch, seq, 8]` to the same."""

    def __init__(self, experts: nn.Module | None = None, k: int = K) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.k = k
        if experts is not None:
            self.experts = experts

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, indices = self.router(x).softmax(-1).topk(self.k, -1)
        return weights / weights.sum(-1, keepdim=True), indices

    def mix(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        return self.out(x + self.mix(x, *self.route(x)))


class MaskedLoop(Mixture):
    """A loop over experts, each on all tokens, under a mask."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleList(Feed(bias=True) for _ in range(EXPERTS)))

    def mix(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            weight = (weights * (indices == e)).sum(-1, keepdim=True)
            out += weight * expert(x)
        return out


class WhereLoop(Mixture):
    """The mask in a `where`, the experts without gates, one choice at a time."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleList(Plain() for _ in range(EXPERTS)))

    def mix(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            made = expert(x)
            for place in range(self.k):
                chosen = (indices[..., place] == e).unsqueeze(-1)
                weighted = made * weights[..., place].unsqueeze(-1)
                out = out + torch.where(chosen, weighted, torch.zeros_like(weighted))
        return out


class SharedBeside(MaskedLoop):
    """A shared expert that every token passes, of the size of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = Feed(bias=True)
        self.shared_gate = nn.Linear(WIDTH, 1)

    def mix(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        shared = self.shared(x) * torch.sigmoid(self.shared_gate(x))
        return super().mix(x, weights, indices) + shared


class Stacked(Mixture):
    """All experts on all tokens by batched products, gate and up in one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(0.3 * torch.randn(EXPERTS, WIDTH, 2 * HIDDEN))
        self.down = nn.Parameter(0.3 * torch.randn(EXPERTS, HIDDEN, WIDTH))

    def mix(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        rows = x.reshape(-1, WIDTH)
        dense = torch.zeros(rows.shape[0], EXPERTS).scatter(
            1, indices.reshape(-1, self.k), weights.reshape(-1, self.k)
        )
        every = rows.unsqueeze(0).expand(EXPERTS, -1, -1)
        gate, up = torch.bmm(every, self.gate_up).chunk(2, -1)
        made = torch.bmm(F.gelu(gate, approximate="tanh") * up, self.down)
        return (made * dense.t().unsqueeze(-1)).sum(0).reshape(x.shape)


class Sliced(Mixture):
    """Stacks of matrices, of which a loop takes one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(0.3 * torch.randn(EXPERTS, WIDTH, HIDDEN))
        self.w2 = nn.Parameter(0.3 * torch.randn(EXPERTS, HIDDEN, WIDTH))
        self.w3 = nn.Parameter(0.3 * torch.randn(EXPERTS, WIDTH, HIDDEN))

    def mix(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        mask = F.one_hot(indices, EXPERTS).to(x.dtype)
        dense = (weights.unsqueeze(-1) * mask).sum(-2)
        out = 0.0
        for e in range(EXPERTS):
            made = (F.relu(x @ self.w1[e]) * (x @ self.w3[e])) @ self.w2[e]
            out = out + made * dense[..., e : e + 1]
        return out


class TopOne(Mixture):
    """One expert for each token, its choice without a dimension of its own."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleList(Feed() for _ in range(EXPERTS)))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, indices = self.router(x).softmax(-1).max(-1)
        return weights, indices

    def mix(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        parts = [
            expert(x) * (weights * (indices == e)).unsqueeze(-1)
            for e, expert in enumerate(self.experts)
        ]
        return torch.stack(parts).sum(0)


SPELLINGS = {
    cls.__name__: cls for cls in (MaskedLoop, WhereLoop, SharedBeside, Stacked, Sliced, TopOne)
}
