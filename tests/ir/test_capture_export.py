"""The fallback tracer and the second opinion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress.errors import CaptureError
from fxcompress.ir.capture import capture
from fxcompress.ir.ops import op_name


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.drop = nn.Dropout(0.1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.full((8,), 2.0))

    def forward(self, x: Tensor, flip: bool = False) -> dict[str, Any]:
        y = self.pool(self.stem(x)).flatten(2).transpose(1, 2)
        y = self.drop(y * self.scale)
        z, _ = self.attention(y, y, y, need_weights=False)
        y = self.norm(y + z)
        return {"out": y[:, 1:] if not flip else -y, "batch": [x.shape[0]]}


def test_export_gives_back_the_modules() -> None:
    model = Mixed().eval()
    program = capture(model, (torch.randn(2, 3, 8, 8),), tracer="export")
    program.verify()
    called = [n.target for n in program.nodes if n.op == "call_module"]
    assert called[:4] == ["stem.0", "stem.1", "stem.2", "pool"]
    assert "norm" in called
    assert "attention.out_proj" not in called
    assert not any(op_name(n).startswith("aten.") for n in program.nodes)
    assert program.module.state_dict().keys() == model.state_dict().keys()
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(program(x)["out"], model(x)["out"])
    assert program(x)["batch"] == [5]
    assert {"tracer", "train-differs"} <= {note.kind for note in program.notes}


def test_export_agrees_with_the_recorder() -> None:
    program = capture(Mixed(), (torch.randn(2, 3, 8, 8),), check="export")
    assert program.dims["batch"].example == 2


def test_what_export_cannot_capture_either_is_explained() -> None:
    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    model = Reads().train()
    with pytest.raises(CaptureError, match=r"torch\.export cannot capture Reads"):
        capture(model, (torch.randn(2, 3),), tracer="export")
    assert model.training


def test_a_program_captured_again_is_the_same_program() -> None:
    x = torch.randn(2, 3, 8, 8)
    program = capture(Mixed(), (x,), name="mixed")
    again = capture(program.module, (x,), name="mixed")
    assert again.text() == program.text()
    assert "train-differs" not in {note.kind for note in again.notes}


def test_an_exported_program_is_captured_in_its_own_names(tmp_path: Path) -> None:
    model = Mixed().eval()
    x = torch.randn(2, 3, 8, 8)
    shapes = ({0: torch.export.Dim.DYNAMIC}, None)
    exported = torch.export.export(model, (x, False), dynamic_shapes=shapes, strict=False)
    torch.export.save(exported, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    program = capture(loaded, (x, False))
    program.verify()
    called = {n.target for n in program.nodes if n.op == "call_module"}
    assert {"stem.0", "stem.1", "norm"} <= called
    assert {scope for n in program.nodes for scope in n.meta.get("scope", ())} >= {
        ("attention", "torch.nn.MultiheadAttention")
    }
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(program(x, False)["out"], model(x)["out"])
