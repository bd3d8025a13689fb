"""How a Program is called: nested inputs and outputs, and calls that do not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress.errors import CaptureError, ModelError
from fxcompress.ir.capture import capture
from tests.ir.capturing import ConvNet


@dataclass
class Result:
    logits: Tensor
    extra: dict[str, Any]


class Nested(nn.Module):
    def forward(
        self,
        pair: tuple[Tensor, Tensor],
        *rest: Tensor,
        named: dict[str, Tensor],
        flag: bool = True,
    ) -> Result:
        total = pair[0] + pair[1] * named["a"]
        for tensor in rest:
            total = total - tensor
        return Result(total if flag else -total, {"list": [total * 2, None], "three": 3})


def test_nested_inputs_and_outputs_keep_their_structure() -> None:
    def args(batch: int) -> tuple[Any, ...]:
        x = [torch.randn(batch, 3) for _ in range(5)]
        return ((x[0], x[1]), x[2], x[3]), {"named": {"a": x[4]}}

    positional, keywords = args(2)
    program = capture(Nested(), positional, keywords)
    assert [i.name for i in program.signature.inputs] == [
        "pair_0", "pair_1", "rest_0", "rest_1", "named_a",
    ]  # fmt: skip
    positional, keywords = args(4)
    got, wanted = program(*positional, **keywords), Nested()(*positional, **keywords)
    assert isinstance(got, Result)
    torch.testing.assert_close(got.logits, wanted.logits)
    torch.testing.assert_close(got.extra["list"][0], wanted.extra["list"][0])
    assert got.extra["three"] == 3
    assert program.copy()(*positional, **keywords).extra["list"][1] is None


def test_calls_that_do_not_fit_are_explained() -> None:
    x = torch.randn(2, 3)
    program = capture(Nested(), ((x, x),), {"named": {"a": x}})
    with pytest.raises(ModelError, match="fixed to True"):
        program((x, x), named={"a": x}, flag=False)
    with pytest.raises(ModelError, match="another structure"):
        program((x, x), named={"b": x})
    with pytest.raises(ModelError, match="another structure"):
        program((x, x), x, named={"a": x})
    with pytest.raises((ModelError, TypeError), match="named"):
        program((x, x))


def test_inputs_that_do_not_fit_the_model_are_explained() -> None:
    with pytest.raises(ModelError, match="do not fit"):
        capture(ConvNet(), ())
    with pytest.raises(ModelError, match="no tensor input") as caught:
        capture(ConvNet(), (torch.randn(2, 3, 8, 8),), dynamic={"y": {0: "batch"}})
    assert "x" in str(caught.value)
    with pytest.raises(ModelError, match="4 dimensions"):
        capture(ConvNet(), (torch.randn(2, 3, 8, 8),), dynamic={"x": {4: "batch"}})
    with pytest.raises(CaptureError, match="RuntimeError"):
        capture(ConvNet(), (torch.randn(2, 5, 8, 8),))


class PythonTypes(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (
            torch.zeros(x.shape, dtype=int) + x.to(int),
            x.to(float),
            torch.ones_like(x, dtype=bool),
        )


def test_types_of_python_are_dtypes() -> None:
    x = 3 * torch.randn(2, 3)
    program = capture(PythonTypes(), (x,), dynamic="batch")
    for got, wanted in zip(program(x), PythonTypes()(x), strict=True):
        assert got.dtype is wanted.dtype
        assert torch.equal(got, wanted)
