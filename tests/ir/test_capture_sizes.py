"""Sizes stay symbolic, and data decide nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxcompress.errors import CaptureError
from fxcompress.ir.capture import capture
from tests.ir.capturing import assert_same, kinds, targets


def test_symbolic_sizes_stay_nodes_with_arithmetic() -> None:
    class Sizes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            b, n, c = x.shape
            half = n // 2
            positions = torch.arange(n * 2 - 1, device=x.device)[: half + 1]
            scaled = x[:, :half].reshape(b * half, c) / (n**0.5)
            return scaled.sum() + positions.sum() / max(n, 1)

    model = Sizes()
    program = capture(model, (torch.randn(2, 6, 4),), dynamic={"x": {0: "batch", 1: "seq"}})
    for batch, seq in ((3, 8), (5, 10), (2, 7)):
        assert_same(program, model, torch.randn(batch, seq, 4))
    assert "size" in targets(program)


def test_a_condition_on_a_size_is_noted_as_an_assumption() -> None:
    class Long(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.shape[1] > 4 else x

    program = capture(Long(), (torch.randn(2, 6),), dynamic={"x": {0: "batch", 1: "seq"}})
    (note,) = (note for note in program.notes if note.kind == "assumption")
    assert note.about == "seq"
    assert "test_capture_sizes.py" in note.text


class Loop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        total = x[:, 0]
        for step in range(1, x.shape[1]):
            total = total + x[:, step]
        return total


def test_a_loop_over_a_dynamic_size_is_refused_naming_the_line() -> None:
    dynamic = {"x": {0: "batch", 1: "seq"}}
    with pytest.raises(CaptureError, match="'seq' only") as caught:
        capture(Loop(), (torch.randn(2, 5),), dynamic=dynamic)
    assert "test_capture_sizes.py" in (caught.value.where or "")
    assert "static=['seq']" in caught.value.hint
    program = capture(Loop(), (torch.randn(2, 5),), dynamic=dynamic, static=["seq"])
    assert set(program.dims) == {"batch"}
    assert "static" in kinds(program)
    assert_same(program, Loop(), torch.randn(4, 5))


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x * x.max().item(),
        lambda x: x + len(x.flatten().tolist()),
        lambda x: x + float(x[0, 0]),
        lambda x: x + torch.from_numpy(x.numpy()),
        lambda x: x if torch.equal(x, x) else -x,
    ],
)
def test_reading_data_is_refused_naming_the_line(read: Callable[[Tensor], Tensor]) -> None:
    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return read(x)

    with pytest.raises(CaptureError, match="reads the data") as caught:
        capture(Reads(), (torch.randn(2, 3),))
    assert "test_capture_sizes.py" in (caught.value.where or "")
    assert "opaque" in caught.value.hint


def test_constants_may_be_read() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rates = torch.linspace(0, 1, 3).tolist()
            return x * rates[1] if torch.tensor(rates).sum() > 1 else x

    program = capture(Constant(), (torch.randn(2, 3),))
    assert targets(program) == ["mul"]
