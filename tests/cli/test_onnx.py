from pathlib import Path

import pytest
import torch
from torch import nn

from fxcompress.cli._onnx import measure_onnx
from fxcompress.emit import emit
from fxcompress.ir import capture


def test_original_and_artefact_take_turns_in_onnxruntime(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)).eval()
    program = capture(net, (torch.randn(2, 1, 8, 8),))
    assert measure_onnx(tmp_path, program) == {}
    emit(program, tmp_path / "artifacts", ["onnx"])
    times = measure_onnx(tmp_path, program, batch=3, repeats=2)
    assert {name: each.repeats for name, each in times.items()} == {"original": 2, "result": 2}
    assert all(each.median_ms > 0 for each in times.values())
