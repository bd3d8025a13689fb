"""`prune.sparse_train`: groups fall, the loss holds the others, and pruning then costs nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.axes import analyze
from fxcompress.errors import PassError, SelectorError
from fxcompress.ir import capture
from fxcompress.pipeline import Context
from fxcompress.testing import hash_weights_
from passes.prune._sparse_train import Groups
from passes.prune.sparse_train import SparseTrain
from tests.passes.support import apply


class Net(nn.Module):
    """Two convolutions and a classifier; half of the first layer's work is enough."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 8, 3, padding=1)
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, 1, 8, 8]` → `[batch, 2]`."""
        x = torch.relu(self.norm(self.conv1(x)))
        return self.fc(torch.relu(self.conv2(x)).mean((2, 3)))


def program(seed: int = 0) -> fxc.Program:
    torch.manual_seed(seed)
    return fxc.capture(Net().eval(), (torch.randn(2, 1, 8, 8),), {}, dynamic="batch")


def data() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(6):
        labels = torch.randint(0, 2, (16,), generator=generator)
        images = torch.randn(16, 1, 8, 8, generator=generator) * (0.3 + labels.view(-1, 1, 1, 1))
        batches.append(((images,), labels))
    return {"train": batches}


def step(**options: Any) -> dict[str, Any]:
    return {"use": "prune.sparse_train", "epochs": 6, "optimizer": {"use": "Adam", "lr": 0.01}} | {
        "losses": [{"use": "hard_labels"}],
        **options,
    }


@pytest.mark.parametrize(
    "options",
    [
        {"regularizer": "group_lasso", "strength": 3.0},
        {"regularizer": "growing", "ratio": 0.5},
    ],
)
def test_weak_groups_go_and_pruning_them_costs_nothing(options: dict[str, Any]) -> None:
    start = program()
    sparse = fxc.compress(start, [step(**options)], data=data()).program
    pruned = fxc.compress(sparse, [{"use": "prune.channels", "ratio": 0.3, "criterion": "l2"}])
    x = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(9))
    before, after = sparse.module(x), pruned.module(x)
    assert (before - after).abs().max() < 0.02 * before.std()
    axis = next(a for a in analyze(start).axes if a.name == "conv1.weight[0]")
    norms = Groups(axis, start.state()).norms(sparse.state())
    assert (norms < 0.05 * norms.max()).sum() >= 4
    assert (norms > 0.3 * norms.max()).sum() >= 1


def test_growing_decays_exactly_the_chosen_groups() -> None:
    start = program()
    tame = step(regularizer="growing", ratio=0.25, targets=["conv1.weight*"])
    tame["optimizer"] = {"use": "SGD", "lr": 1e-9}
    sparse = fxc.compress(start, [tame], data=data()).program
    axis = next(a for a in analyze(start).axes if a.name == "conv1.weight[0]")
    groups = Groups(axis, start.state())
    change = groups.norms(sparse.state()) / groups.norms(start.state())
    weakest = groups.norms(start.state()).argsort()[:3]
    assert torch.allclose(change[weakest], torch.full((3,), 1e-3).double(), rtol=1e-2)
    rest = torch.ones(12, dtype=torch.bool).index_fill(0, weakest, False)
    assert torch.allclose(change[rest], torch.ones(9).double(), rtol=1e-4)


def test_group_norm_is_the_norm_of_all_that_goes_with_an_index() -> None:
    start = program()
    axis = next(a for a in analyze(start).axes if a.name == "conv1.weight[0]")
    state = start.state()
    found = Groups(axis, state).norms(state)
    index = 5
    parts = [
        state["conv1.weight"][index], state["conv1.bias"][index], state["norm.weight"][index],
        state["norm.bias"][index], state["conv2.weight"][:, index],
    ]  # fmt: skip
    wanted = torch.cat([part.detach().double().flatten() for part in parts]).norm()
    assert torch.allclose(found[index], wanted)


def test_frozen_parameters_stay_as_they_are() -> None:
    start = program()
    start.module.conv2.requires_grad_(False)
    sparse = fxc.compress(start, [step(epochs=1, strength=3.0)], data=data()).program
    for name in ("conv2.weight", "conv2.bias"):
        assert torch.equal(sparse.state()[name], start.state()[name])


def test_ensures_names_a_parameter_that_changed_without_being_selected() -> None:
    start = program()
    done = apply(SparseTrain, start, {"epochs": 1}, Context(data=data()))
    claimed = done.decision.model_copy(update={"parameters": ("fc.weight", "fc.bias")})
    with pytest.raises(PassError, match="which was not selected"):
        SparseTrain().ensures(start, done.program, claimed)


def test_it_repeats_itself() -> None:
    first = fxc.compress(program(), [step()], data=data())
    again = fxc.compress(program(), [step()], data=data())
    for name, tensor in first.program.state().items():
        assert torch.equal(tensor, again.program.state()[name])


def test_a_selection_of_nothing_is_an_error() -> None:
    with pytest.raises(SelectorError, match="matches no"):
        fxc.compress(program(), [step(targets=["conv9*"])], data=data())


@pytest.mark.golden("passes/prune/sparse_train")
def test_golden(golden_graph: Any) -> None:
    start = hash_weights_(capture(Net().eval(), (torch.zeros(2, 1, 8, 8),)))
    options = {"epochs": 1, "optimizer": {"use": "SGD", "lr": 0.01}, "strength": 0.5}
    image = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    batches = [((torch.cat([image, -image]),), torch.tensor([0, 1]))]
    golden_graph(apply(SparseTrain, start, options, Context(data={"train": batches})).program)


def test_a_norm_that_training_in_integers_divides_by_stays_above_zero() -> None:
    """γ = 0 would be 0/0 where a norm is folded into its layer while both are trained."""
    qat = {"use": "quantize.qat", "calibration": 8, "weights": {"observer": "minmax"},
           "activations": {"observer": "minmax"}}  # fmt: skip
    given = {**data(), "calibration": [batch for batch, _ in data()["train"]]}
    strong = step(strength=30.0, kinds=("channel",), epochs=1)
    result = fxc.compress(program(), [qat, strong, {"use": "tidy.fold_batchnorm"}], data=given)
    before, after = result.record.passes[1].decision["axes"][0], result.program
    assert before["gone"] >= 6, "what it is for still happens"
    gamma = [each for each in result.record.passes[1].edits if each.name == "norm.weight"]
    assert gamma
    images = given["train"][0][0][0]
    assert after(images).isfinite().all()
    assert all(t.isfinite().all() for t in after.state().values() if t.is_floating_point())
