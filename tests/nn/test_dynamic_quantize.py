"""DynamicQuantize: against the naive formula, at its edges, in a graph and back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxcompress.errors import UsageError
from fxcompress.ir import capture
from fxcompress.ir.modules import describe
from fxcompress.nn import DynamicQuantize


def naive(x, bits, per, symmetric):
    """One run of numbers at a time, in float32 scalars."""
    if per == "tensor":
        return naive_run(x.reshape(-1), bits, symmetric).reshape(x.shape)
    rows = x.reshape(-1, x.shape[-1])
    return np.stack([naive_run(row, bits, symmetric) for row in rows]).reshape(x.shape)


def naive_run(row, bits, symmetric):
    low, high = min(row.min(), np.float32(0)), max(row.max(), np.float32(0))
    levels = np.float32(2 ** (bits - 1) - 1 if symmetric else 2**bits - 1)
    scale = (max(-low, high) if symmetric else high - low) / levels
    if scale == 0:
        scale = np.float32(1)
    zero = np.float32(0) if symmetric else np.round(-low / scale)
    q = np.clip(np.round(row / scale) + zero, -levels if symmetric else 0, levels)
    return (q - zero) * scale


@settings(max_examples=80, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    bits=st.integers(2, 8),
    per=st.sampled_from(["token", "tensor"]),
    symmetric=st.booleans(),
    shift=st.sampled_from([-3.0, 0.0, 2.0]),
    seed=st.integers(0, 99),
)
def test_equals_the_naive_formula(shape, bits, per, symmetric, shift, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + shift
    found = DynamicQuantize(bits, per=per, symmetric=symmetric)(x)
    np.testing.assert_array_equal(found.numpy(), naive(x.numpy(), bits, per, symmetric))


def test_equals_the_operator_of_onnx(tmp_path):
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    helper = onnx.helper
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    value = [helper.make_tensor_value_info(name, 1, ["a", "b"]) for name in "xy"]
    model = helper.make_model(
        helper.make_graph(nodes, "g", value[:1], value[1:]),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    module = DynamicQuantize(per="tensor")
    for seed, shift in enumerate((-5.0, -0.3, 0.0, 1.0, 50.0)):
        x = torch.randn(7, 33, generator=torch.Generator().manual_seed(seed)) + shift
        (wanted,) = session.run(None, {"x": x.numpy()})
        np.testing.assert_array_equal(module(x).numpy(), wanted)


@pytest.mark.parametrize("per", ["token", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_zeros_and_change_no_range(per, symmetric):
    module = DynamicQuantize(per=per, symmetric=symmetric)
    x = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.5, 0.0]])
    y = module(x)
    assert torch.equal(y[0], torch.zeros(3))
    wider = module(torch.cat([x, torch.zeros(2, 4)], dim=1))
    assert torch.equal(wider[:, :3], y)
    assert not wider[:, 3:].any()
    tiny = torch.full((2, 3), 1e-44)
    assert torch.isfinite(module(tiny)).all()


def test_a_token_does_not_depend_on_others():
    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    module = DynamicQuantize()
    torch.testing.assert_close(module(x)[1:2, 3:4], module(x[1:2, 3:4]), rtol=0, atol=0)
    with_outlier = torch.cat([x, torch.full((1, 6, 8), 1e4)])
    assert torch.equal(module(with_outlier)[:4], module(x))
    tensor = DynamicQuantize(per="tensor")
    assert not torch.equal(tensor(with_outlier)[:4], tensor(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    module = DynamicQuantize()
    assert torch.equal(module(x), module(x.float()).to(dtype))


def test_the_gradient_passes_through():
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = DynamicQuantize(4)(x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    with torch.no_grad():
        assert torch.equal(DynamicQuantize(4)(x), y)


def test_it_is_captured_as_one_node_and_described():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.quantize = DynamicQuantize(6, per="tensor", symmetric=True)

        def forward(self, x):
            return self.quantize(x)

    program = capture(Model().eval(), (torch.randn(2, 3),), dynamic={"x": {0: "rows"}})
    assert "dynamic_quant(" in program.text()
    config = describe(DynamicQuantize(6, per="tensor", symmetric=True))
    assert config.nondefault() == {"bits": 6, "per": "tensor", "symmetric": True}
    assert not DynamicQuantize().state_dict()


@pytest.mark.parametrize("arguments", [{"bits": 1}, {"bits": 9}, {"per": "channel"}])
def test_what_is_not_possible_is_refused(arguments):
    with pytest.raises(UsageError):
        DynamicQuantize(**arguments)
