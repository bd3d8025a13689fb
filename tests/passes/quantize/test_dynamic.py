"""`quantize.dynamic`: the graph it makes, its numbers, what it leaves alone, and pruning."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxcompress.errors import NumericsError, SelectorError, UsageError
from fxcompress.ir import capture
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import module_of, op_name
from fxcompress.nn import OperandLSTM
from fxcompress.pipeline.context import Context
from fxcompress.testing import check_pass
from passes.prune.channels import Channels
from passes.quantize.dynamic import Dynamic
from passes.quantize.static import Static
from tests.passes.models import ResNet, Transformer, image_batches, token_batches
from tests.passes.quantize.quantised import calibrated
from tests.passes.support import apply, captured, random_input, seeded, sqnr, text_of


class Reader(nn.Module):
    """Two layers that read one tensor, a convolution, and a layer with addmm."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.a, self.b = nn.Linear(8, 6), nn.Linear(8, 6)
        self.weight, self.bias = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5))

    def forward(self, x):
        y = self.conv(x).relu().mean(-1)
        return torch.addmm(self.bias, self.a(y) * self.b(y), self.weight)


class Recurrent(nn.Module):
    def __init__(self, kind="LSTM", layers=2, both=True):
        super().__init__()
        made = getattr(nn, kind)
        self.rnn = made(6, 16, layers, batch_first=True, bidirectional=both)
        self.head = nn.Linear(16 * (1 + both), 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


def recurrent(kind="LSTM", layers=2, both=True, seed=0):
    example = random_input(2, 5, 6)
    model = seeded(lambda: Recurrent(kind, layers, both), seed)
    return capture(model, (example,), dynamic={"x": {0: "batch", 1: "time"}})


def transformer():
    model = seeded(lambda: Transformer(width=16, depth=2, heads=2))
    return capture(model, token_batches(1)[0], dynamic={"ids": {0: "batch", 1: "seq"}})


def rounded(x, per_token):
    low = x.amin(-1, keepdim=True) if per_token else x.amin()
    high = x.amax(-1, keepdim=True) if per_token else x.amax()
    scale = (high.clamp(min=0) - low.clamp(max=0)) / 255
    zero = (-low.clamp(max=0) / scale).round()
    return (((x / scale).round() + zero).clamp(0, 255) - zero) * scale


def rounded_weight(w, dim, bits=8):
    most = 2 ** (bits - 1) - 1
    others = [d for d in range(w.dim()) if d != dim]
    scale = w.abs().amax(others, keepdim=True) / most
    return (w / scale).round().clamp(-most, most) * scale


def test_the_graph_of_shared_readers_a_convolution_and_addmm():
    result = apply(Dynamic, captured(Reader, 2, 4, 7))
    assert text_of(result.program) == [
        "x = input()",
        "x_dq = dynamic_quant(x)",
        "conv.weight = param()",
        "conv_weight_fq = fake_quant(conv.weight)",
        "conv = conv1d(x_dq, conv_weight_fq)",
        "/relu = relu(conv)",
        "/mean = mean(/relu)",
        "mean_dq = dynamic_quant(/mean)",
        "a.weight = param()",
        "a_weight_fq = fake_quant(a.weight)",
        "a = linear(mean_dq, a_weight_fq)",
        "b.weight = param()",
        "b_weight_fq = fake_quant(b.weight)",
        "b = linear(mean_dq, b_weight_fq)",
        "/mul = mul(a, b)",
        "mul_dq = dynamic_quant(/mul)",
        "bias = param()",
        "weight = param()",
        "weight_fq = fake_quant(weight)",
        "/addmm = addmm(bias, mul_dq, weight_fq)",
        "output = output(/addmm)",
    ]
    nodes = {name: node for node, name in node_ids(result.program).items()}
    assert module_of(nodes["x_dq"]).per == "tensor"
    assert module_of(nodes["mean_dq"]).per == "token"
    assert module_of(nodes["weight_fq"]).axis == 1
    assert not result.declined
    assert "4 weights as 8-bit integers per channel" in result.decision.summary()


@pytest.mark.parametrize("per", ["token", "tensor"])
def test_numbers_are_those_of_the_formula(per):
    program = captured(Reader, 2, 4, 7)
    result = apply(Dynamic, program, {"activations": {"per": per}})
    x, state = random_input(3, 4, 7), program.state()
    with torch.no_grad():
        w = rounded_weight(state["conv.weight"], 0)
        y = nn.functional.conv1d(rounded(x, False), w, state["conv.bias"], padding=1)
        y = rounded(y.relu().mean(-1), per == "token")
        a, b = (
            nn.functional.linear(y, rounded_weight(state[f"{n}.weight"], 0), state[f"{n}.bias"])
            for n in "ab"
        )
        m = rounded(a * b, per == "token")
        wanted = state["bias"] + m @ rounded_weight(state["weight"], 1)
        torch.testing.assert_close(result.program.module(x), wanted, rtol=1e-4, atol=1e-4)


@settings(max_examples=12, deadline=None)
@given(
    bits=st.integers(2, 8),
    activations=st.integers(2, 8),
    per=st.sampled_from(["channel", "tensor"]),
    symmetric=st.booleans(),
)
def test_any_width(bits, activations, per, symmetric):
    program = captured(Reader, 2, 4, 7)
    options = {
        "weights": {"bits": bits, "per": per},
        "activations": {"bits": activations, "symmetric": symmetric},
    }
    result = apply(Dynamic, program, options)
    assert torch.isfinite(result.program.module(random_input(3, 4, 7))).all()
    if bits == activations == 8:
        assert sqnr(program.module, result.program.module, random_input(3, 4, 7)) > 25


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers_take_their_matrices_as_operands(kind):
    program = recurrent(kind)
    result = apply(Dynamic, program)
    names = [
        f"rnn.weight_{part}_l{layer}{end}"
        for layer in (0, 1)
        for end in ("", "_reverse")
        for part in ("ih", "hh")
    ]
    (entry,) = result.decision.recurrent
    assert [each.tensor for each in entry.weights] == names
    assert result.ops().count("fake_quant") == 9
    assert result.ops().count("dynamic_quant") == 1
    before, after = program.state(), result.program.state()
    assert all(after[name] is before[name] for name in before)
    x = random_input(3, 9, 6)
    assert sqnr(program.module, result.program.module, x) > 35


def test_an_lstm_with_states_given_and_returned():
    class States(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(6, 8)

        def forward(self, x, h, c):
            y, (h, c) = self.lstm(x, (h, c))
            return y, h, c

    inputs = (random_input(5, 2, 6), random_input(1, 2, 8), random_input(1, 2, 8, seed=3))
    program = capture(seeded(States), inputs)
    made = apply(Dynamic, program).program
    with torch.no_grad():
        for wanted, got in zip(program.module(*inputs), made.module(*inputs), strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=0.05)
    assert isinstance(made.module.get_submodule("lstm"), OperandLSTM)


def test_the_pass_keeps_its_promises():
    # Nine layers: quantizer of the input, parameter, quantizer, form, and two changed calls each.
    check_pass(Dynamic, transformer(), edits=63, tolerance=0.05, idempotent=False)


@pytest.mark.parametrize("kinds", [["neuron"], ["residual"]])
def test_pruning_a_quantised_transformer_equals_its_masked_reference(kinds):
    quantised = apply(Dynamic, transformer()).program
    pruned = apply(Channels, quantised, {"ratio": 0.5, "kinds": kinds}).program
    assert sum(t.numel() for t in pruned.state().values()) < sum(
        t.numel() for t in quantised.state().values()
    )


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_hidden_units_are_pruned_before_and_after(kind):
    # `ensures` of the pruning pass compares with the masked reference.
    options = {"ratio": 0.5, "kinds": ["neuron"]}
    after = apply(Channels, apply(Dynamic, recurrent(kind)).program, options).program
    assert after.module.get_submodule("rnn").hidden_size < 16
    scale = after.state()["rnn_weight_hh_l0_fq.scale"]
    assert scale.shape[0] == after.state()["rnn.weight_hh_l0"].shape[0]
    before = apply(Dynamic, apply(Channels, recurrent(kind), options).program).program
    assert before.module.get_submodule("rnn").hidden_size < 16


def test_it_composes_with_static_quantization_of_other_layers():
    program = captured(ResNet, 2, 3, 16, 16)
    from passes.tidy.fold_batchnorm import FoldBatchNorm

    folded = apply(FoldBatchNorm, program).program
    static = apply(
        Static, folded, {"targets": ["layer1.*"], "calibration": 16}, calibrated()
    ).program
    both = apply(Dynamic, static)
    assert both.reasons()["layer1.0.conv1"] == "it is quantised already"
    assert {each.layers[0] for each in both.decision.weights} >= {"stem.0", "head"}
    x = image_batches(1)[0]
    assert sqnr(folded.module, both.program.module, *x) > 20


def test_quantising_twice_is_refused():
    for program in (transformer(), recurrent()):
        once = apply(Dynamic, program).program
        with pytest.raises(UsageError, match="there is no layer to quantise") as caught:
            apply(Dynamic, once)
        assert "it is quantised already" in caught.value.reason


def test_what_cannot_be_quantised_is_declined_with_the_reason():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 8, proj_size=4, batch_first=True)
            self.cell = nn.GRUCell(4, 4)
            self.out = nn.Linear(4, 2)

        def forward(self, x):
            y = self.lstm(x)[0][:, -1]
            return self.out(self.cell(y))

    result = apply(Dynamic, captured(Odd, 2, 3, 4))
    reasons = result.reasons()
    assert "projections" in reasons["lstm"]
    assert "cell" in reasons["cell"]
    assert [each.layers for each in result.decision.weights] == [("out",)]


def test_nothing_to_quantise_and_selectors_that_fit_nothing():
    program = captured(lambda: nn.Sequential(nn.ReLU()), 2, 3)
    with pytest.raises(SelectorError, match="nothing is selected"):
        apply(Dynamic, program)
    with pytest.raises(SelectorError, match="c"):
        apply(Dynamic, captured(Reader, 2, 4, 7), {"targets": ["c"]})


def test_a_nan_in_a_weight_is_an_error_and_zeros_are_not():
    def build(value):
        model = seeded(Reader)
        model.a.weight.data[1] = value
        return capture(model, (random_input(2, 4, 7),))

    with pytest.raises(NumericsError, match=r"a NaN or an infinity in a\.weight"):
        apply(Dynamic, build(float("nan")))
    made = apply(Dynamic, build(0.0)).program
    assert torch.isfinite(made.module(random_input(2, 4, 7))).all()


def test_plans_on_meta_weights():
    with torch.device("meta"):
        model = Recurrent().eval()
    program = capture(model, (torch.empty(2, 5, 6, device="meta"),))
    planned = apply(Dynamic, program, {}, Context(planning=True))
    assert len(planned.decision.pending) == 9
    assert not planned.decision.arrays
    assert sum(op_name(node) == "fake_quant" for node in planned.program.nodes) == 9
