"""Models that write: in place, into buffers, into caches of their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxcompress.errors import CaptureError
from fxcompress.ir.capture import capture
from tests.ir.capturing import assert_same, targets


class InPlace(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = x * 1.5
        y += x
        y[:, 1] = 0.0
        y[..., -1:] *= 2
        view = y.view(x.shape[0], -1)
        view[:, 0].add_(1)
        y.masked_fill_(mask, -3.0)
        y[mask] = 7.0
        left, right = y.chunk(2, dim=-1)
        left.copy_(right)
        torch.relu_(y)
        z = torch.zeros_like(y)
        z[torch.arange(x.shape[0]), 1] = right[:, 0, :1]
        return y + view.reshape(y.shape) + z


def test_in_place_calls_become_out_of_place_and_reach_every_view() -> None:
    model = InPlace()
    x, mask = torch.randn(3, 4, 6), torch.rand(3, 4, 6) > 0.5
    program = capture(model, (x, mask))
    program.verify()
    kept = x.clone()
    assert_same(program, model, x, mask)
    assert torch.equal(x, kept)


def test_a_lazily_filled_cache_is_not_baked_into_the_model() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(4))
            self.cache: dict[str, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            if "bias" not in self.cache:
                self.cache["bias"] = self.bias * 2
            return x + self.cache["bias"]

    model = Lazy().eval()
    program = capture(model, (torch.randn(2, 4),))
    assert model.cache == {}
    assert targets(program) == ["param", "mul", "add"]


def test_a_buffer_that_is_changed_is_noted() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return x + self.seen

    program = capture(Counts(), (torch.randn(2, 3),))
    assert [n.about for n in program.notes if n.kind == "mutation"] == ["seen"]


def test_a_program_that_differs_from_its_model_is_refused() -> None:
    class Remembers(nn.Module):
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            Remembers.calls += 1
            return self.linear(x) * Remembers.calls

    with pytest.raises(CaptureError, match="computes something else"):
        capture(Remembers(), (torch.randn(2, 3),))
