import pytest
import torch
from torch import nn

from fxcompress.errors import SelectorError
from fxcompress.ir import capture
from passes.tidy.fold_batchnorm import FoldBatchNorm
from tests.passes.support import apply, captured, random_input, relative_error, text_of

AFTER = {
    "conv1d": (lambda: [nn.Conv1d(3, 8, 3, bias=False), nn.BatchNorm1d(8)], (2, 3, 9)),
    "conv2d": (lambda: [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)], (2, 3, 9, 9)),
    "grouped": (lambda: [nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8)], (2, 4, 9, 9)),
    "depthwise": (lambda: [nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)], (2, 4, 9, 9)),
    "conv3d": (lambda: [nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3, affine=False)], (2, 2, 4, 4, 4)),
    "transposed": (lambda: [nn.ConvTranspose2d(3, 6, 2), nn.BatchNorm2d(6)], (2, 3, 5, 5)),
    "transposed-grouped": (
        lambda: [nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6)],
        (2, 4, 5, 5),
    ),
    "transposed-1d": (lambda: [nn.ConvTranspose1d(3, 6, 2), nn.BatchNorm1d(6)], (2, 3, 5)),
    "linear": (lambda: [nn.Linear(5, 7), nn.BatchNorm1d(7)], (3, 5)),
    "two in a row": (
        lambda: [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)],
        (2, 3, 5, 5),
    ),
}  # fmt: skip
BEFORE = {
    "conv2d": (lambda: [nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, bias=False)], (2, 3, 9, 9)),
    "grouped": (lambda: [nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, groups=2)], (2, 4, 9, 9)),
    "reflect": (
        lambda: [nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")],
        (2, 3, 9, 9),
    ),
    "linear": (lambda: [nn.BatchNorm1d(5), nn.Linear(5, 7, bias=False)], (3, 5)),
    "both sides": (lambda: [nn.BatchNorm1d(5), nn.Linear(5, 7), nn.BatchNorm1d(7)], (3, 5)),
}  # fmt: skip


def sequence(layers):
    return lambda: nn.Sequential(*layers())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("layers", "shape"),
    [*AFTER.values(), *BEFORE.values()],
    ids=[*(f"after {k}" for k in AFTER), *(f"before {k}" for k in BEFORE)],
)
def test_computes_the_same_with_no_batch_norm_left(layers, shape, seed):
    program = captured(sequence(layers), *shape, seed=seed)
    result = apply(FoldBatchNorm, program)
    assert "batch_norm" not in result.ops()
    assert result.declined == ()
    x = random_input(5, *shape[1:], seed=seed + 10)
    assert relative_error(program, result.program, x) < 2e-6


def test_structure_and_edits():
    program = captured(sequence(AFTER["conv1d"][0]), 2, 3, 9)
    result = apply(FoldBatchNorm, program)
    assert text_of(result.program) == ["input = input()", "0 = conv1d(input)", "output = output(0)"]
    removed = [edit.name for edit in result.edits if edit.kind == "remove-tensor"]
    assert removed == [
        "1.bias", "1.num_batches_tracked", "1.running_mean", "1.running_var", "1.weight",
    ]  # fmt: skip
    assert [edit.name for edit in result.edits if edit.kind == "add-tensor"] == ["0.bias"]
    assert [edit.name for edit in result.edits if edit.kind == "set-tensor"] == ["0.weight"]
    assert [edit.node for edit in result.edits if edit.kind == "remove-node"] == ["1"]
    assert list(result.program.state()) == ["0.weight", "0.bias"]


def test_is_computed_in_double_precision():
    def build():
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    program = captured(build, 2, 3, 5, 5)
    result = apply(FoldBatchNorm, program)
    conv, norm = program.module.get_submodule("0"), program.module.get_submodule("1")
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    exact = conv.weight.double() * scale[:, None, None, None]
    folded = result.program.state()["0.weight"]
    # One rounding: at most half a unit in the last place of float32.
    assert ((folded.double() - exact).abs() <= exact.abs() * 2.0**-24 * 1.01).all()


def test_keeps_half_precision_and_trainability():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval().to(torch.bfloat16)
    model[0].weight.requires_grad_(False)
    program = capture(model, (torch.randn(2, 3, 5, 5, dtype=torch.bfloat16),))
    state = apply(FoldBatchNorm, program).program.state()
    assert state["0.weight"].dtype == state["0.bias"].dtype == torch.bfloat16
    assert not state["0.weight"].requires_grad
    assert state["0.bias"].requires_grad


class TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.b(self.conv(self.a(self.conv(x)).relu())).relu()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.norm(self.one(x)) + self.two(x)


class AfterReLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x).relu()).relu()


LEFT = {
    "two readers": (TwoReaders, (2, 3, 5, 5), "norm", "the output of conv has 2 users"),
    "reused": (Reused, (2, 3, 5, 5), "b", "conv is a reused module, called 2 times"),
    "tied": (Tied, (2, 4), "norm", "one.weight is shared with two.weight"),
    "after relu": (AfterReLU, (2, 3, 5, 5), "norm", "no layer makes its input: /relu does"),
    "batch statistics": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        (2, 3, 5, 5), "1", "it has no running statistics",
    ),
    "zero padding": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)),
        (2, 3, 5, 5), "0", "the zeros that 1 pads would not get its shift",
    ),
    "transposed after it": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 4, 3)),
        (2, 3, 5, 5), "0", "its shift does not reach every output of 1 alike",
    ),
    "linear over a sequence": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(5)),
        (2, 5, 4), "1", "its channels are dim 1 of 3, those of 0 the last",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("build", "shape", "node", "reason"), LEFT.values(), ids=LEFT)
def test_explains_what_it_leaves(build, shape, node, reason):
    program = captured(build, *shape)
    result = apply(FoldBatchNorm, program)
    assert reason in result.reasons()[node]
    assert result.edits == ()
    assert result.program.fingerprint() == program.fingerprint()


def test_zero_padding_is_no_obstacle_without_a_shift():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)).eval()
    model[0].running_var.uniform_(0.5, 2)
    program = capture(model, (torch.randn(2, 3, 5, 5),))
    result = apply(FoldBatchNorm, program)
    assert "batch_norm" not in result.ops()
    assert relative_error(program, result.program, random_input(3, 3, 5, 5)) < 2e-6


def test_selection_and_side():
    def build():
        return nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 7), nn.BatchNorm1d(7))

    program = captured(build, 3, 5)
    chosen = apply(FoldBatchNorm, program, {"targets": ["2"]})
    assert text_of(chosen.program)[1:3] == ["0 = batch_norm(input)", "1 = linear(0)"]
    previous = apply(FoldBatchNorm, program, {"into": ["previous"]})
    assert previous.reasons() == {"0": "no layer makes its input: input does"}


def test_is_idempotent():
    program = captured(sequence(AFTER["conv2d"][0]), 2, 3, 9, 9)
    once = apply(FoldBatchNorm, program).program
    with pytest.raises(SelectorError, match="nothing is selected"):
        apply(FoldBatchNorm, once)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["1.norm*"]}, "matches nothing"),
        ({"expect": 2}, "1 nodes are selected, 2 are expected"),
    ],
)
def test_a_selection_that_does_not_fit_is_an_error(options, message):
    program = captured(sequence(AFTER["conv2d"][0]), 2, 3, 9, 9)
    with pytest.raises(SelectorError, match=message):
        apply(FoldBatchNorm, program, options)


@pytest.mark.parametrize("options", [{"into": ["above"]}, {"target": ["1"]}, {"expect": -1}])
def test_bad_options_are_refused(options):
    program = captured(sequence(AFTER["conv2d"][0]), 2, 3, 9, 9)
    with pytest.raises(ValueError, match="validation error"):
        apply(FoldBatchNorm, program, options)


def test_plans_on_meta_weights():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    program = capture(model, (torch.empty(2, 3, 5, 5, device="meta"),))
    result = apply(FoldBatchNorm, program)
    assert result.program.state()["0.weight"].device.type == "meta"
    assert "batch_norm" not in result.ops()
