"""Cases of attention and recurrent layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.axes.support import Built, Case, Net, Sizes, case

__all__ = ["CASES"]


def attention(s: Sizes, heads: int = 4, groups: int = 4, **options: Any) -> Built:
    """Heads of width b; fewer key heads where there are groups; values are as wide as c."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q = m.q(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        k = m.k(x).unflatten(-1, (groups, -1)).transpose(1, 2)
        v = m.v(x).unflatten(-1, (groups, -1)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=heads != groups, **options)
        return m.out(mixed.transpose(1, 2).flatten(2))

    net = Net(
        forward, q=nn.Linear(s.a, heads * s.b), k=nn.Linear(s.a, groups * s.b),
        v=nn.Linear(s.a, groups * s.c), out=nn.Linear(heads * s.c, s.a),
    )  # fmt: skip
    return net, (torch.randn(2, 6, s.a),)


def _masked(s: Sizes) -> Built:
    """A learnt bias per head."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).view(-1, 6, 3, 4, s.b).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=m.bias)
        return m.out(mixed.transpose(1, 2).reshape(-1, 6, 4 * s.b))

    net = Net(
        forward, qkv=nn.Linear(s.a, 12 * s.b), out=nn.Linear(4 * s.b, s.a),
        bias=nn.Parameter(torch.randn(4, 6, 6)),
    )  # fmt: skip
    return net, (torch.randn(2, 6, s.a),)


def recurrent(kind: Any, s: Sizes, states: bool = False, **options: Any) -> Built:
    """Two linears around a recurrent layer, and its last state."""
    layer = kind(s.b, s.c, batch_first=True, **options)
    both = 2 if layer.bidirectional else 1
    width = layer.proj_size or s.c

    def forward(m: Any, x: Tensor) -> Any:
        y, last = m.rnn(m.up(x))
        last = last[0] if isinstance(last, tuple) else last
        return (m.down(y), m.end(last)) if states else m.down(y)

    net = Net(
        forward, up=nn.Linear(s.a, s.b), rnn=layer, down=nn.Linear(both * width, 3),
        end=nn.Linear(width, 2),
    )  # fmt: skip
    return net, (torch.randn(3, 5, s.a),)


def _cell(kind: Any, s: Sizes) -> Built:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.up(x)
        state = m.cell(y[:, 0])
        state = m.cell(y[:, 1], state)
        return m.down(state[0] if isinstance(state, tuple) else state)

    net = Net(forward, up=nn.Linear(s.a, s.b), cell=kind(s.b, s.c), down=nn.Linear(s.c, 3))
    return net, (torch.randn(3, 2, s.a),)


CASES: tuple[Case, ...] = (
    case("sdpa", attention),
    case("sdpa", lambda s: attention(s, scale=0.3), "scale"),
    case("sdpa", lambda s: attention(s, is_causal=True), "causal"),
    case("sdpa", lambda s: attention(s, 12, 4), "gqa"),
    case("sdpa", _masked, "bias"),
    case("lstm", lambda s: recurrent(nn.LSTM, s)),
    case("lstm", lambda s: recurrent(nn.LSTM, s, states=True), "states"),
    case("lstm", lambda s: recurrent(
        nn.LSTM, Sizes(s.a, s.b, s.c + 1), num_layers=2, bidirectional=True, proj_size=s.c),
         "projected"),
    case("gru", lambda s: recurrent(nn.GRU, s, num_layers=2, bidirectional=True)),
    case("gru", lambda s: recurrent(nn.GRU, s, bias=False), "bare"),
    case("rnn", lambda s: recurrent(nn.RNN, s, states=True)),
    case("lstm_cell", lambda s: _cell(nn.LSTMCell, s)),
    case("gru_cell", lambda s: _cell(nn.GRUCell, s)),
    case("rnn_cell", lambda s: _cell(nn.RNNCell, s)),
)  # fmt: skip
