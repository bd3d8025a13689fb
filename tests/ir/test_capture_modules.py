"""Modules that capture takes apart, keeps whole, or leaves opaque."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress.errors import CaptureError
from fxcompress.ir.capture import capture
from tests.ir.capturing import ConvNet, assert_same, kinds, targets


def test_multi_head_attention_is_taken_apart() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    program = capture(model, (torch.randn(2, 5, 8),), dynamic={"src": {0: "batch", 1: "seq"}})
    assert "sdpa" in targets(program)
    assert "multi_head_attention" not in targets(program)
    assert "train-differs" not in kinds(program)
    assert_same(program, model, torch.randn(3, 9, 8))


def test_attention_weights_are_taken_apart_too() -> None:
    class Weights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, kdim=6, vdim=4)

        def forward(self, x: Tensor, y: Tensor, z: Tensor, pad: Tensor) -> Any:
            return self.attention(x, y, z, key_padding_mask=pad)

    model = Weights()
    pad = torch.zeros(2, 7, dtype=torch.bool)
    args = (torch.randn(5, 2, 8), torch.randn(7, 2, 6), torch.randn(7, 2, 4), pad)
    program = capture(model, args, dynamic=None)
    pad[1, 3:] = True
    assert_same(program, model, *args)
    assert "train-differs" not in kinds(program)


def test_recurrent_layers_stay_one_call() -> None:
    model = nn.Sequential()
    model.add_module("lstm", nn.LSTM(4, 6, 2, bidirectional=True, batch_first=True, proj_size=3))

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Any:
            output, (hidden, cell) = self.inner.lstm(x)
            return output, hidden, cell

    program = capture(First(), (torch.randn(2, 5, 4),), dynamic={"x": {0: "batch", 1: "time"}})
    assert targets(program).count("lstm") == 1
    assert_same(program, First(), torch.randn(3, 8, 4))
    program.verify()


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[int(x.sum() > 0)](x)


def test_an_opaque_subtree_is_one_untouched_call() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.router, self.last = nn.Linear(4, 4), Router(), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.router(self.first(x)))

    model = Mixture()
    with pytest.raises(CaptureError, match="reads the data"):
        capture(model, (torch.randn(2, 4),))
    program = capture(model, (torch.randn(2, 4),), opaque=["router"])
    assert [n.target for n in program.nodes if n.op == "call_module"] == ["first", "router", "last"]
    (note,) = (note for note in program.notes if note.kind == "opaque")
    assert note.about == "router"
    assert program.module.state_dict().keys() == model.state_dict().keys()
    for seed in range(4):
        torch.manual_seed(seed)
        assert_same(program, model, torch.randn(seed + 1, 4))


def test_an_opaque_glob_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(CaptureError, match="matches no module") as caught:
        capture(ConvNet(), (torch.randn(2, 3, 8, 8),), opaque=["sten.*"])
    assert "stem" in str(caught.value)
