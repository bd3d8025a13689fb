import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fxcompress.analysis import cost
from fxcompress.ir import capture


def _counted(model: nn.Module, *args: torch.Tensor) -> int:
    """MACs by torch's own counter, without the fused attention of CPUs, which it cannot count."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
            torch.no_grad(),
        ):
            model(*args)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2


class Mixed(nn.Module):
    """Every family of product: convolutions, transposed, grouped, einsum, attention, functional."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 16, 3, groups=8, padding=1)
        self.up = nn.ConvTranspose2d(16, 12, 2, stride=2)
        self.proj = nn.Linear(12, 24)
        self.table = nn.Parameter(torch.randn(24, 24))
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        y = self.up(torch.relu(self.depthwise(self.stem(x))))
        tokens = self.proj(y.flatten(2).transpose(1, 2))
        mixed = torch.einsum("btc,cd->btd", tokens, self.table)
        heads = mixed.unflatten(-1, (4, 6)).transpose(1, 2)
        attended = F.scaled_dot_product_attention(heads, heads, heads)
        scores = heads @ heads.transpose(-1, -2)
        pooled = (scores.softmax(-1) @ attended).transpose(1, 2).flatten(2).mean(1)
        return self.head(F.linear(pooled, self.table))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Mixed(), (2, 3, 8, 8)),
        (nn.Sequential(nn.Conv1d(4, 6, 5, dilation=2), nn.GELU(), nn.Conv1d(6, 3, 1)), (3, 4, 20)),
        (nn.Sequential(nn.Conv3d(2, 4, 3), nn.ReLU()), (2, 2, 5, 6, 7)),
        (nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), (2, 7, 16)),
        (nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4, bias=False)), (2, 3, 6)),
    ],
)
@pytest.mark.parametrize("batch", [1, 5])
def test_macs_agree_with_torch_s_counter(model, shape, batch):
    model.eval()
    cost_ = cost(capture(model, (torch.randn(shape),)))
    counted = _counted(model, torch.randn(batch, *shape[1:]))
    assert cost_.at(batch=batch).macs == counted
    assert cost_.at(batch=batch).flops == 2 * counted


def test_recurrent_layers_count_both_products_of_each_step():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(5, 7, num_layers=2, bidirectional=True, batch_first=True)

        def forward(self, x):
            return self.rnn(x)[0]

    per_step = 2 * (4 * 7 * (5 + 7)) + 2 * (4 * 7 * (14 + 7))
    assert cost(capture(Reader().eval(), (torch.randn(2, 3, 5),))).macs == 3 * per_step


def test_totals_are_the_sum_of_nodes_and_of_top_modules():
    total = cost(capture(Mixed().eval(), (torch.randn(2, 3, 8, 8),)))
    for figure in ("parameters", "bytes", "macs"):
        assert getattr(total, figure) == sum(getattr(n, figure) for n in total.per_node)
    root = next(m for m in total.per_module() if m.path == "")
    assert (root.parameters, root.bytes, root.macs) == (total.parameters, total.bytes, total.macs)
    assert total.parameters == sum(p.numel() for p in Mixed().parameters())
    assert total.unknown == {}


def test_tied_weights_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(20, 8)
            self.head = nn.Linear(8, 20, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    total = cost(capture(Tied().eval(), (torch.randint(0, 20, (2, 3)),)))
    assert total.parameters == 160
    assert total.bytes == 640


def test_meta_weights_cost_the_same():
    real = cost(capture(Mixed().eval(), (torch.randn(2, 3, 8, 8),))).summary()
    with torch.device("meta"):
        model, x = Mixed().eval(), torch.randn(2, 3, 8, 8)
    assert cost(capture(model, (x,))).summary() == real


def test_activation_peak_holds_what_is_alive_and_counts_views_once():
    class Wide(nn.Module):
        def forward(self, x):
            wide = torch.cat([x, x, x, x], 1)  # 16 while x (4) is alive
            return wide.flatten(1).view(-1, 4, 4).sum(1)  # views cost nothing

    total = cost(capture(Wide(), (torch.randn(2, 4),)))
    assert total.activation_peak == (4 + 16) * 4
    assert total.at(batch=3).activation_peak == 3 * (4 + 16) * 4


def test_an_unknown_dimension_is_refused():
    program = capture(nn.Linear(2, 2), (torch.randn(2, 2),))
    with pytest.raises(KeyError, match="height"):
        cost(program, {"height": 3})


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.sampled_from([1, 2]),
    st.integers(1, 4),
)  # fmt: skip
def test_random_convolutions_agree(groups, width, kernel, stride, batch):
    model = nn.Sequential(
        nn.Conv2d(2 * groups, width * groups, kernel, stride=stride, groups=groups), nn.ReLU()
    )
    cost_ = cost(capture(model.eval(), (torch.randn(2, 2 * groups, 7, 6),), verify=False))
    assert cost_.at(batch=batch).macs == _counted(model, torch.randn(batch, 2 * groups, 7, 6))
