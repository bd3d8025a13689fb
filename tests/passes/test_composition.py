"""Every pass after every other: the proofs hold, or the second one says what is missing."""

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import FxCompressError

STEPS: dict[str, dict[str, Any]] = {
    "fold": {"use": "tidy.fold_batchnorm"},
    "static": {"use": "quantize.static", "calibration": 16},
    "channels": {"use": "prune.channels", "ratio": 0.5},
    "unstructured": {"use": "prune.unstructured", "ratio": 0.5},
    "masks": {"use": "prune.unstructured", "ratio": 0.5, "mode": "keep"},
    "n_m": {"use": "prune.n_m"},
    "fit": {"use": "train.fit", "epochs": 1, "losses": [{"use": "hard_labels"}]},
    "cast": {"use": "tidy.cast", "dtype": "bfloat16"},
    "lora": {"use": "factorize.lora", "rank": 4},
    "svd": {"use": "factorize.svd", "rank": 4, "calibration": 16},
}
# What the second step has nothing left to do on, and what it then says.
REFUSED = {
    ("fold", "fold"): "no node that this pass works on",
    ("static", "static"): "it is quantised already",
    ("unstructured", "unstructured"): "as sparse already",
    ("masks", "masks"): "as sparse already",
    ("n_m", "n_m"): "as sparse already",
    ("cast", "cast"): "no node that this pass works on",
    ("cast", "fold"): "no layer makes its input",
    ("masks", "fold"): "masked or quantised already",
    ("lora", "fold"): "no layer makes its input: /add does",
    ("lora", "lora"): "c1: it has an adapter",
    ("masks", "svd"): "c1: its weight has a mask",
    ("svd", "svd"): "rank 4 saves parameters in no layer",
}


class Net(nn.Module):
    """Convolutions with batch norms, a residual sum, a strided layer, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.b1 = nn.BatchNorm2d(16)
        self.c2 = nn.Conv2d(16, 16, 3, padding=1)
        self.b2 = nn.BatchNorm2d(16)
        self.c3 = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.fc1 = nn.Linear(24, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, 3, 16, 16]` → `[batch, 10]`."""
        x = torch.relu(self.b1(self.c1(x)))
        x = x + torch.relu(self.b2(self.c2(x)))
        x = torch.relu(self.c3(x)).mean((2, 3))
        return self.fc2(torch.relu(self.fc1(x)))


@pytest.fixture(scope="module")
def program() -> fxc.Program:
    torch.manual_seed(0)
    return fxc.capture(Net().eval(), (torch.randn(2, 3, 16, 16),), {}, dynamic="batch")


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(8, 3, 16, 16, generator=generator),) for _ in range(4)]
    labels = [torch.randint(0, 10, (8,), generator=generator) for _ in batches]
    labelled = list(zip(batches, labels, strict=True))
    return {"calibration": batches, "train": labelled}


@pytest.fixture(scope="module")
def after(program: fxc.Program, data: dict[str, Any]) -> Callable[[str], fxc.Program]:
    """Return the Program after one step, made once."""
    return cache(lambda name: fxc.compress(program, [STEPS[name]], data=data).program)


def pairs() -> list[Any]:
    """Return every pair; the second order of those that compose is for the slow tests."""
    order = list(STEPS)
    return [
        pytest.param(
            *pair,
            marks=[pytest.mark.slow]
            if order.index(pair[0]) > order.index(pair[1]) and pair not in REFUSED
            else [],
        )
        for pair in product(STEPS, STEPS)
    ]


@pytest.mark.parametrize(("first", "second"), pairs())
def test_pairs_compose(
    after: Callable[[str], fxc.Program], data: dict[str, Any], first: str, second: str
) -> None:
    if (first, second) in REFUSED:
        with pytest.raises(FxCompressError) as refusal:
            fxc.compress(after(first), [STEPS[second]], data=data)
        assert REFUSED[first, second] in str(refusal.value)
        return
    result = fxc.compress(after(first), [STEPS[second]], data=data)
    assert result.module(torch.randn(3, 3, 16, 16)).isfinite().all()
    if "channels" not in (first, second):
        return
    state = result.program.state()
    # Each of two prunings halves; scales, zero points and masks shrink with the weights.
    width = 4 if first == second else 8
    if "svd" in (first, second):
        # The rank is an axis too.
        rank = 2 if second == "channels" else 4
        assert state["c2_svd.A.weight"].shape[:2] == (rank, width)
        assert state["c2_svd.B.weight"].shape[:2] == (width, rank)
        return
    assert state["c2.weight"].shape[:2] == (width, width)
    for name, tensor in state.items():
        if name.startswith("c2_lora.A"):
            # The rank is an axis of its own, and pruning after the adapter halves it too.
            assert tensor.shape[:2] == (2 if second == "channels" else 4, width), name
        elif name.startswith("c2") and tensor.dim() >= 1:
            assert tensor.shape[0] == width, name
