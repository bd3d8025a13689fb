"""A captured model trains like the original, or a note says where it does not."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.ir.capture import capture
from tests.ir.capturing import kinds, targets, train_step


class Stochastic(nn.Module):
    """Functional dropout, attention dropout, stochastic depth and a functional norm."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.path = DropPath(0.5)
        self.norm = OwnNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3 if self.training else 0.0)
        mixed = F.dropout(mixed, 0.4, training=self.training)
        return self.norm((x + self.path(mixed)).transpose(1, 2)).transpose(1, 2)


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask.div_(keep)


class OwnNorm(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training,
            self.momentum, self.eps,
        )  # fmt: skip


def test_trains_like_the_original() -> None:
    model = Stochastic()
    program = capture(model, (torch.randn(4, 5, 8),))
    assert "train-differs" not in kinds(program)
    assert type(program.module.get_submodule("path")).__name__ == "StochasticDepth"
    assert type(program.module.get_submodule("norm")) is nn.BatchNorm1d
    assert type(program.module.get_submodule("dropout")) is nn.Dropout
    ours, theirs = copy.deepcopy(program.module), copy.deepcopy(model)
    x = torch.randn(6, 5, 8)
    (out, grads), (expected, wanted) = train_step(ours, x), train_step(theirs, x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads, wanted)
    torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))


def test_a_structure_that_differs_in_training_is_noted() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.aux = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Any:
            return (self.head(x), self.aux(x)) if self.training else self.head(x)

    program = capture(Auxiliary(), (torch.randn(2, 4),))
    notes = {note.kind: note for note in program.notes}
    assert "evaluation" in notes["train-differs"].text
    assert notes["unused"].about == "aux"
    assert set(program.state()) == {"head.weight", "head.bias"}


def test_gradients_stop_where_the_original_stops_them() -> None:
    class Stops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                fixed = self.one(x).exp()
            soft = self.two(x)
            return fixed * soft + (soft.round() - soft).detach() + x.detach()

    model = Stops()
    program = capture(model, (torch.randn(2, 4),))
    assert targets(program).count("detach") == 3
    x = torch.randn(3, 4)
    (_, grads), (_, wanted) = train_step(copy.deepcopy(program.module), x), train_step(model, x)
    torch.testing.assert_close(grads, wanted)
    assert grads["one.weight"] is None
