import importlib.util
import subprocess
import sys

import pytest

CODE = """
from fxcompress._torchvision import declare_operators
declare_operators()
assert declare_operators() is declare_operators()
import torch, torchvision
model = torchvision.models.resnet18(num_classes=3).eval()
assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
assert torch.ops.torchvision.nms is not None
"""


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="no torchvision here")
def test_torchvision_imports_after_its_operators_are_declared() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_is_declared_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxcompress import _torchvision

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert _torchvision.declare_operators.__wrapped__() is None
