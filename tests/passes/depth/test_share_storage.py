"""What layers share is stored once in every format."""

from pathlib import Path

import pytest
import torch

import fxcompress as fxc
from fxcompress.emit import emit
from tests.passes.models import Transformer
from tests.passes.support import seeded

SIZES = {"ids": {0: "batch", 1: "seq"}}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["program", "python", "pt2", "onnx", "openvino", "executorch"])
def test_shared_layers_are_stored_once(tmp_path: Path, form: str) -> None:
    model = seeded(lambda: Transformer(width=64, depth=6, heads=4))
    program = fxc.capture(model, (torch.randint(0, 50, (2, 8)),), dynamic=SIZES)
    shared = fxc.compress(program, [{"use": "depth.share_layers", "groups": 3}]).program

    def stored(program: fxc.Program, folder: Path) -> int:
        emit(program, folder, [form])
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    whole = 4 * sum(tensor.numel() for tensor in program.state().values())
    once = 4 * sum(tensor.numel() for tensor in shared.state().values())
    assert once < 0.4 * whole
    # What is no tensor (graph, sizes, names) is less than half of the tensors here.
    assert once < stored(shared, tmp_path) < once + 0.2 * whole
