import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxcompress.errors import SelectorError
from passes.tidy.replace_activation import ReplaceActivation
from tests.passes.support import apply, captured, random_input, text_of


class Mixed(nn.Module):
    """One module called twice, a function, and another activation."""

    def __init__(self, activation=nn.ReLU):
        super().__init__()
        self.a, self.b, self.act = nn.Linear(4, 8), nn.Linear(8, 8), activation()

    def forward(self, x):
        x = self.act(self.b(self.act(self.a(x))))
        return torch.sigmoid(F.relu(x) - F.gelu(x))


def test_modules_and_functions_are_replaced_and_nothing_else():
    program = captured(Mixed, 2, 4)
    result = apply(ReplaceActivation, program, {"replace": {"relu": "relu6"}})
    assert text_of(result.program) == [
        "x = input()",
        "a = linear(x)",
        "act = relu6(a)",
        "b = linear(act)",
        "act@2 = relu6(b)",
        "/relu6 = relu6(act@2)",
        "/gelu = gelu(act@2)",
        "/sub = sub(/relu6, /gelu)",
        "/sigmoid = sigmoid(/sub)",
        "output = output(/sigmoid)",
    ]
    assert [edit.path for edit in result.edits if edit.kind == "set-module"] == ["act"]
    assert not [edit for edit in result.edits if "tensor" in edit.kind]


@pytest.mark.parametrize(
    ("target", "function"),
    [
        ("relu6", F.relu6),
        ("hardswish", F.hardswish),
        ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
        ("leaky_relu", F.leaky_relu),
        ("identity", lambda x: x),
        ("softplus", F.softplus),
        ("hardtanh", F.hardtanh),
        ("mish", F.mish),
    ],
)
@pytest.mark.parametrize("as_module", [True, False], ids=["module", "function"])
def test_computes_the_new_function(target, function, as_module):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.act = nn.Linear(4, 8), nn.SiLU()

        def forward(self, x):
            return (self.act if as_module else F.silu)(self.linear(x))

    program = captured(Model, 2, 4)
    result = apply(ReplaceActivation, program, {"replace": {"silu": target}})
    x = random_input(5, 4) * 5
    linear = program.module.get_submodule("linear")
    assert torch.equal(result.program(x), function(linear(x)))


def test_relu6_equals_relu_where_nothing_exceeds_six():
    program = captured(Mixed, 2, 4)
    result = apply(ReplaceActivation, program, {"replace": {"relu": "relu6"}})
    x = random_input(6, 4)
    assert torch.equal(result.program(x), program(x))
    big = 1000 * x
    assert not torch.equal(result.program(big), program(big))


def test_one_call_of_a_shared_module():
    program = captured(Mixed, 2, 4)
    result = apply(
        ReplaceActivation, program, {"replace": {"relu": "hardswish"}, "targets": ["act@2"]}
    )
    assert text_of(result.program)[2:5] == [
        "act = relu(a)",
        "b = linear(act)",
        "act_hardswish = hardswish(b)",
    ]


def test_several_at_once_are_not_chained():
    program = captured(Mixed, 2, 4)
    replace = {"relu": "gelu", "gelu": "relu"}
    ops = apply(ReplaceActivation, program, {"replace": replace}).ops()
    assert ops == ["input", "linear", "gelu", "linear", "gelu", "gelu", "relu", "sub", "sigmoid",
                   "output"]  # fmt: skip


def test_a_parametrised_activation_loses_its_parameter():
    program = captured(lambda: Mixed(nn.PReLU), 2, 4)
    result = apply(ReplaceActivation, program, {"replace": {"prelu": "relu"}})
    assert "act.weight" in program.state()
    assert "act.weight" not in result.program.state()
    assert [edit.name for edit in result.edits if edit.kind == "remove-tensor"] == ["act.weight"]


def test_is_idempotent():
    once = apply(ReplaceActivation, captured(Mixed, 2, 4), {"replace": {"gelu": "silu"}}).program
    with pytest.raises(SelectorError, match="there is no gelu to replace") as caught:
        apply(ReplaceActivation, once, {"replace": {"gelu": "silu"}})
    assert "relu, sigmoid, silu" in caught.value.reason


def test_an_excluded_activation_stays():
    program = captured(Mixed, 2, 4)
    result = apply(ReplaceActivation, program, {"replace": {"relu": "relu6"}, "exclude": ["/relu"]})
    assert "/relu = relu(act@2)" in text_of(result.program)
    assert result.ops().count("relu6") == 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"replace": {}},
        {"replace": {"relu": "swish"}},
        {"replace": {"softmax": "relu"}},
        {"replace": {"relu": "relu"}},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match="validation error"):
        apply(ReplaceActivation, captured(Mixed, 2, 4), options)
