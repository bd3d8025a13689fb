"""Which axes attention, norms by hand, recurrent layers and experts have, and of which kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.axes import analyze
from fxcompress.ir import capture
from tests.axes.cases.sequence import attention, recurrent
from tests.axes.support import Built, Net, Sizes, axes_at
from tests.axes.test_structure_vision import kinds, places, solved

HEADS, WIDTH, MODEL = 4, 6, 5


def on_tokens(compute: Any, **parts: Any) -> Built:
    """A module of tokens."""
    return Net(compute, **parts), (torch.randn(2, 7, MODEL),)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by hand, heads in dimension 1."""
    scores = (q @ k.transpose(-2, -1)) * WIDTH**-0.5
    return scores.softmax(-1) @ v


def _out(size: int = HEADS * WIDTH) -> nn.Linear:
    return nn.Linear(size, MODEL)


def fused(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).view(-1, 7, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
    return m.out(attend(q, k, v).transpose(1, 2).reshape(-1, 7, HEADS * WIDTH))


def chunked(m: Any, x: Tensor) -> Tensor:
    q, k, v = (each.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for each in m.qkv(x).chunk(3, -1))
    return m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def by_letters(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).unflatten(-1, (3, HEADS, WIDTH)).unbind(2)
    shares = torch.einsum("...qhd,...khd->...hqk", q, k).softmax(-1)
    return m.out(torch.einsum("...hqk,...khd->...qhd", shares, v).flatten(-2))


@pytest.mark.parametrize("compute", [fused, chunked, by_letters])
def test_fused_queries_keys_and_values(compute: Any) -> None:
    analysis = solved(on_tokens(compute, qkv=nn.Linear(MODEL, 3 * HEADS * WIDTH), out=_out()))
    found = sorted((axis.kind, axis.size) for axis in analysis.axes)
    # Cut as (3, heads, width), all three share one width; cut in chunks, values have their own.
    widths = [("head_width", WIDTH)] * (2 if compute is chunked else 1)
    assert found == [("head", HEADS), *widths]
    head = next(axis for axis in analysis.axes if axis.kind == "head")
    assert places(head) == {"qkv.weight[0]", "qkv.bias[0]", "out.weight[1]"}


def test_grouped_queries_have_groups_and_heads_within() -> None:
    analysis = solved(attention(Sizes(5, 6, 7), 12, 4))
    found = sorted((axis.kind, axis.size) for axis in analysis.axes)
    assert found == [("head", 3), ("head_width", 6), ("head_width", 7), ("kv_group", 4)]
    group = next(axis for axis in analysis.axes if axis.kind == "kv_group")
    assert {"q.weight[0]", "k.weight[0]", "v.weight[0]", "out.weight[1]"} <= places(group)


def test_repeated_keys_are_grouped_queries_too() -> None:
    """Key heads repeated by expand and reshape, as Llama's code writes it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q = m.q(x).unflatten(-1, (12, WIDTH)).transpose(1, 2)
        k, v = (
            each.unflatten(-1, (4, WIDTH)).transpose(1, 2)[:, :, None]
            .expand(-1, -1, 3, -1, -1).reshape(-1, 12, 7, WIDTH)
            for each in (m.k(x), m.v(x))
        )  # fmt: skip
        return m.out(attend(q, k, v).transpose(1, 2).flatten(2))

    analysis = solved(on_tokens(
        forward, q=nn.Linear(MODEL, 12 * WIDTH), k=nn.Linear(MODEL, 4 * WIDTH),
        v=nn.Linear(MODEL, 4 * WIDTH), out=_out(12 * WIDTH),
    ))  # fmt: skip
    sizes = sorted(axis.size for axis in analysis.axes)
    assert sizes == [3, 4, WIDTH, WIDTH]
    group = next(axis for axis in analysis.axes if axis.size == 4)
    assert {"q.weight[0]", "k.weight[0]", "v.weight[0]", "out.weight[1]"} <= places(group)
    inner = next(axis for axis in analysis.axes if axis.size == 3)
    assert places(inner) == {"q.weight[0]", "q.bias[0]", "out.weight[1]"}
    assert (group.kind, inner.kind) == ("kv_group", "head")


def _halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def _pairs(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


@pytest.mark.parametrize("turn", [_halves, _pairs])
def test_rotary_positions_leave_heads_free_and_fix_their_width(turn: Any) -> None:
    """The tables of angles are constants of the model's own width: pairs go together or not."""
    angles = torch.outer(torch.arange(7.0), torch.tensor([1.0, 0.3, 0.1]))
    table = torch.cat([angles, angles], -1) if turn is _halves else angles.repeat_interleave(2, -1)

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (
            each.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for each in (m.q(x), m.k(x), m.v(x))
        )
        q, k = (each * m.cos + turn(each) * m.sin for each in (q, k))
        return m.out(attend(q, k, v).transpose(1, 2).flatten(2))

    wide = {name: nn.Linear(MODEL, HEADS * WIDTH) for name in "qkv"}
    analysis = solved(on_tokens(forward, **wide, out=_out(), cos=table.cos(), sin=table.sin()))
    heads = [axis for axis in analysis.axes if axis.kind == "head"]
    assert [axis.size for axis in heads] == [HEADS]
    assert {f"{name}.weight[0]" for name in "qkv"} <= places(heads[0])
    widths = sorted(axis.size for axis in analysis.axes if axis.kind == "head_width")
    assert widths == [WIDTH // 2, WIDTH]  # pairs of queries and keys, and the values' own


def test_a_relative_position_table_follows_the_heads() -> None:
    order = (torch.arange(49) * 5) % 13

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).view(-1, 7, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
        bias = m.table[m.order].view(7, 7, HEADS).permute(2, 0, 1)
        mixed = ((q @ k.transpose(-2, -1)) + bias[None]).softmax(-1) @ v
        return m.out(mixed.transpose(1, 2).flatten(2))

    analysis = solved(on_tokens(
        forward, qkv=nn.Linear(MODEL, 3 * HEADS * WIDTH), out=_out(),
        table=nn.Parameter(torch.randn(13, HEADS)), order=order,
    ))  # fmt: skip
    head = next(axis for axis in analysis.axes if axis.kind == "head")
    assert "table[1]" in places(head)


def test_gated_units_tie_both_halves() -> None:
    analysis = solved(on_tokens(
        lambda m, x: m.out(F.glu(m.both(x))), both=nn.Linear(MODEL, 12), out=_out(6)
    ))  # fmt: skip
    (axis,) = analysis.axes
    assert (axis.kind, axis.size) == ("neuron", 6)
    halves = analysis.places("both.weight")[0].parts
    assert halves == (axis, axis)


def _by_hand(name: str) -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.up(x)
        if name == "rms":
            normed = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        elif name == "layer":
            centred = y - y.mean(-1, keepdim=True)
            normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        elif name == "batch":
            normed = (y - m.mean) * torch.rsqrt(m.var.exp() + 1e-5)
        else:
            groups = y.unflatten(-1, (3, -1))
            spread, centre = torch.var_mean(groups, -1, keepdim=True, unbiased=False)
            normed = ((groups - centre) * torch.rsqrt(spread + 1e-5)).flatten(-2)
        return m.out(normed * m.gain + m.shift)

    return forward


@pytest.mark.parametrize("name", ["rms", "layer", "batch", "group"])
def test_norms_by_hand(name: str) -> None:
    row = lambda: nn.Parameter(torch.randn(12))  # noqa: E731
    extra = {"mean": row(), "var": row()} if name == "batch" else {}
    analysis = solved(on_tokens(
        _by_hand(name), up=nn.Linear(MODEL, 12), gain=row(), shift=row(), out=_out(12), **extra
    ))  # fmt: skip
    found = sorted((axis.size, axis.statistics) for axis in analysis.axes)
    statistics = name != "batch"
    assert found == ([(3, False), (4, True)] if name == "group" else [(12, statistics)])
    assert {"gain[0]", "shift[0]", "up.weight[0]"} <= places(analysis.axes[0])


def test_recurrent_layers_have_a_hidden_and_a_projected_width() -> None:
    built = recurrent(nn.LSTM, Sizes(5, 6, 7), num_layers=2, bidirectional=True, proj_size=4)
    analysis = solved(built)
    assert sorted(axis.size for axis in analysis.axes) == [4, 6, 7]
    hidden = next(axis for axis in analysis.axes if axis.size == 7)
    assert hidden.kind == "neuron"
    suffixes = [f"l{layer}{way}" for layer in (0, 1) for way in ("", "_reverse")]
    assert places(hidden) == {
        f"rnn.{name}_{suffix}[{dim}]"
        for suffix in suffixes
        for name, dim in [
            ("weight_ih", 0), ("weight_hh", 0), ("bias_ih", 0), ("bias_hh", 0), ("weight_hr", 1),
        ]
    }  # fmt: skip


def test_tied_embeddings_are_one_place() -> None:
    net = Net(
        lambda m, ids: m.head(torch.tanh(m.mid(m.table(ids)))),
        table=nn.Embedding(11, 6), mid=nn.Linear(6, 6), head=nn.Linear(6, 11, bias=False),
    )  # fmt: skip
    net.head.weight = net.table.weight
    analysis = solved((net, (torch.randint(0, 11, (2, 5)),)))
    (axis,) = analysis.axes
    assert (axis.kind, axis.size) == ("embedding", 6)
    assert places(axis) == {"table.weight[1]", "mid.weight[0]", "mid.weight[1]", "mid.bias[0]"}
    vocabulary = analysis.axis("table.weight[0]")
    assert vocabulary.frozen is not None
    assert "looked up" in vocabulary.frozen.reason


@pytest.mark.parametrize("equation", [None, "etc,ecd->etd"])
def test_stacked_experts(equation: str | None) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        product = torch.bmm if equation is None else lambda a, b: torch.einsum(equation, a, b)
        tokens = x.flatten(0, 1)
        shares = m.router(tokens).softmax(-1)
        hidden = torch.relu(product(tokens.expand(4, -1, -1), m.up))
        return (product(hidden, m.down) * shares.t()[..., None]).sum(0)

    analysis = solved(on_tokens(
        forward, router=nn.Linear(MODEL, 4), up=nn.Parameter(torch.randn(4, MODEL, 6)),
        down=nn.Parameter(torch.randn(4, 6, MODEL)),
    ))  # fmt: skip
    expert = next(axis for axis in analysis.axes if axis.size == 4)
    hidden = next(axis for axis in analysis.axes if axis.size == 6)
    assert len(analysis.axes) == 2
    assert places(expert) == {"router.weight[0]", "router.bias[0]", "up[0]", "down[0]"}
    assert places(hidden) == {"up[2]", "down[1]"}
    assert (expert.kind, hidden.kind) == ("expert", "neuron")
    assert expert in axes_at(analysis, "softmax")
    assert expert.statistics
    assert not hidden.statistics


def test_every_free_axis_is_named_after_what_makes_it() -> None:
    analysis = solved(on_tokens(
        lambda m, x: m.out(torch.relu(m.up(x))), up=nn.Linear(MODEL, 9), out=_out(9)
    ))  # fmt: skip
    assert kinds(analysis) == {"up.weight[0]": ("neuron", 9)}


class NoRegisters(nn.Module):
    """Tokens to prepend, of which there are none: a parameter `[1, 0, width]`."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(1, 0, 8))
        self.fc, self.out = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.cat([self.tokens.expand(x.shape[0], -1, -1), x], 1)
        return self.out(self.fc(x).relu())


def test_a_dimension_without_entries_is_no_axis_to_prune():
    analysis = analyze(capture(NoRegisters().eval(), (torch.randn(2, 4, 8),)))
    assert [(axis.name, axis.size) for axis in analysis.axes] == [("fc.weight[0]", 6)]
    assert str(analysis.axis("tokens[1]").frozen) == "it has no indices"
