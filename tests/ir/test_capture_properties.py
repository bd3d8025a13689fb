"""Random programs of views, in-place calls and sizes: the captured graph computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxcompress.errors import CaptureError
from fxcompress.ir.capture import capture

Step = Callable[[list[Tensor]], None]

# A view of the last tensor joins the list; all have at least two elements per dimension used.
_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose": lambda t: t.transpose(0, -1),
    "permute": lambda t: t.permute(*reversed(range(t.dim()))),
    "unsqueeze": lambda t: t.unsqueeze(1),
    "select": lambda t: t.select(-1, 0) if t.dim() > 2 else t.unsqueeze(0),
    "slice": lambda t: t[..., 1:],
    "step": lambda t: t[..., ::2],
    "negative": lambda t: t[..., -1:],
    "newaxis": lambda t: t[:, None, ..., :1],
    "narrow": lambda t: t.narrow(-1, 0, 1),
    "chunk": lambda t: t.chunk(2, dim=-1)[0],
    "split": lambda t: t.split(1, dim=-1)[-1],
    "unbind": lambda t: t.unbind(-1)[0] if t.dim() > 2 else t,
    "flatten": lambda t: t.view(-1) if t.is_contiguous() and t.dim() > 3 else t,
    "diagonal": lambda t: t.diagonal(dim1=-2, dim2=-1) if t.dim() > 2 else t,
    "detach": lambda t: t.detach(),
    "mT": lambda t: t.mT if t.dim() > 1 else t,
    "squeeze": lambda t: t.squeeze(),
    "expanded": lambda t: t + t.mean(),
}


def _add(tensors: list[Tensor]) -> None:
    tensors[-1].add_(0.5)


def _multiply(tensors: list[Tensor]) -> None:
    tensors[-1] *= 1.5


def _relu(tensors: list[Tensor]) -> None:
    torch.relu_(tensors[-1])


def _copy(tensors: list[Tensor]) -> None:
    tensors[-1].copy_(tensors[0].mean())


def _set(tensors: list[Tensor]) -> None:
    tensors[-1][..., 0] = tensors[0].sum()


def _mask(tensors: list[Tensor]) -> None:
    tensors[-1][tensors[-1] > 0.3] = -1.0


def _fill(tensors: list[Tensor]) -> None:
    tensors[0][:, -1].fill_(2.0)


def _clamp(tensors: list[Tensor]) -> None:
    tensors[len(tensors) // 2].clamp_(-0.7, 0.7)


def _index(tensors: list[Tensor]) -> None:
    tensors[0][torch.arange(tensors[0].shape[0]), 1] = 0.25


_CHANGES: tuple[Step, ...] = (
    _add, _multiply, _relu, _copy, _set, _mask, _fill, _clamp, _index,
)  # fmt: skip


class Steps(nn.Module):
    def __init__(self, steps: list[Any]) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> list[Tensor]:
        tensors = [x * 1.0]
        for step in self.steps:
            if isinstance(step, str):
                tensors.append(_VIEWS[step](tensors[-1]))
            else:
                step(tensors)
        return [tensor + 0.125 for tensor in tensors]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.sampled_from(sorted(_VIEWS)), st.sampled_from(_CHANGES)), max_size=7))
def test_views_and_in_place_calls(steps: list[Any]) -> None:
    model = Steps(steps)
    try:
        model(torch.randn(2, 4, 4))
    except (IndexError, RuntimeError):
        assume(False)
    try:
        program = capture(model, (torch.randn(2, 4, 4),), verify=False)
    except CaptureError as error:
        # Cutting the batch itself into pieces has another course for every batch size.
        assume("'batch' only" not in str(error))
        raise
    program.verify()
    for batch in (2, 5):
        x = torch.randn(batch, 4, 4)
        torch.testing.assert_close(program(x), model(x))


_SIZES: dict[str, Callable[[Any, Any], Any]] = {
    "sum": lambda a, b: a + b,
    "difference": lambda a, b: a * 2 + b - 3,
    "product": lambda a, b: a * b,
    "halves": lambda a, b: (a + 1) // 2 + b,
    "rest": lambda a, b: a * 3 + b % 3,
    "greatest": lambda a, b: torch.sym_max(a, b) if not isinstance(a, int) else max(a, b),
    "ceiling": lambda a, b: -(-a // 2) + b,
}


class Arithmetic(nn.Module):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def forward(self, x: Tensor) -> list[Tensor]:
        batch, length = x.shape[0], x.shape[1]
        made = []
        for name in self.names:
            size = _SIZES[name](batch, length)
            made.append(torch.arange(size, device=x.device).float() / size)
            length = length + 1
        return [x.mean() + tensor for tensor in made]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(sorted(_SIZES)), min_size=1, max_size=4))
def test_size_arithmetic(names: list[str]) -> None:
    model = Arithmetic(names)
    dynamic = {"x": {0: "batch", 1: "length"}}
    program = capture(model, (torch.randn(3, 8),), dynamic=dynamic, verify=False)
    program.verify()
    for shape in ((3, 8), (4, 11), (9, 5)):
        x = torch.randn(*shape)
        torch.testing.assert_close(program(x), model(x))
