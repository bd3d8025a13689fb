"""The pruning benchmarks judge both sides by one reference, and it notices what is wrong."""

import copy
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from benchmarks.prune._children import Task
from benchmarks.prune._groups import GROUPS, group
from benchmarks.prune._judge import judge
from benchmarks.prune._masked import masked_reference, run_masked
from benchmarks.prune._ours import _control
from benchmarks.prune._page import render
from benchmarks.prune._plot import plot
from benchmarks.prune._quality_models import NETWORKS, network
from benchmarks.prune._results import Outcome, read_outcomes, write_outcomes
from benchmarks.prune._sides import work
from benchmarks.prune.quality import Cell, _render
from benchmarks.zoo import ZooModel, load_zoo
from benchmarks.zoo._models import image_inputs, randomise


class Normed(nn.Module):
    """An MLP whose hidden width passes a norm, with statistics that removal changes."""

    def __init__(self, norm):
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(6, 8), norm, nn.Linear(8, 3)

    def forward(self, x):
        return self.fc2(self.norm(self.fc1(x)))


class WrittenOutNorm(nn.Module):
    """RMS normalisation in plain operations, as language models have it."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class CentredNorm(WrittenOutNorm):
    """The same with the mean taken off first: what was removed is then no longer zero."""

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


REMOVED = {
    "fc1.weight": {0: [1, 4]},
    "fc1.bias": {0: [1, 4]},
    "norm.weight": {0: [1, 4]},
    "norm.bias": {0: [1, 4]},
    "fc2.weight": {1: [1, 4]},
}
KEPT = torch.tensor([0, 2, 3, 5, 6, 7])


def normed(norm):
    torch.manual_seed(0)
    model = Normed(norm)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    small = copy.deepcopy(model)
    small.fc1.weight = nn.Parameter(model.fc1.weight[KEPT])
    small.fc1.bias = nn.Parameter(model.fc1.bias[KEPT])
    small.fc2.weight = nn.Parameter(model.fc2.weight[:, KEPT])
    for name, parameter in model.norm.named_parameters():
        setattr(small.norm, name, nn.Parameter(parameter[KEPT]))
    if hasattr(norm, "normalized_shape"):
        small.norm.normalized_shape = (6,)
    return model, small


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(8), nn.RMSNorm(8), WrittenOutNorm(8), CentredNorm(8)]
)
def test_norm_statistics_are_over_the_kept_channels(norm):
    model, small = normed(norm)
    inputs = ((torch.randn(5, 6),), {})
    assert judge(model, REMOVED, small, inputs).right
    plain = masked_reference(model, REMOVED)
    assert not torch.allclose(plain(*inputs[0]), small(*inputs[0]), atol=1e-3)


def test_one_wrong_channel_is_noticed():
    model, small = normed(nn.LayerNorm(8))
    wrong = {**REMOVED, "fc2.weight": {1: [1, 5]}}
    assert judge(model, wrong, small, ((torch.randn(5, 6),), {})).error > 0.01


def test_group_norm_keeps_its_groups():
    torch.manual_seed(0)
    norm = nn.GroupNorm(2, 4)
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 4, 3, 3)
    reference = masked_reference(norm, {"weight": {0: [1, 3]}, "bias": {0: [1, 3]}})
    out = run_masked(reference, lambda: reference(x), everywhere=False)
    small = nn.functional.group_norm(x[:, [0, 2]], 2, norm.weight[[0, 2]], norm.bias[[0, 2]])
    assert torch.allclose(out[:, [0, 2]], small, atol=1e-6)
    assert not out[:, [1, 3]].any()


class Averaged(nn.Module):
    """States `[batch, state, width]` normalised over the width, then averaged over the states."""

    def __init__(self):
        super().__init__()
        self.states = nn.Parameter(torch.randn(1, 4, 6))
        self.norm = nn.LayerNorm(6)
        nn.init.normal_(self.norm.bias)

    def forward(self, x):
        return self.norm(self.states * x[:, None]).mean(1)


def test_what_was_removed_stays_so_after_a_norm_over_another_dimension():
    torch.manual_seed(0)
    model = Averaged()
    small = copy.deepcopy(model)
    small.states = nn.Parameter(model.states[:, [0, 2]])
    assert judge(model, {"states": {1: [1, 3]}}, small, ((torch.randn(5, 6),), {})).right
    assert not judge(model, {"states": {1: [0, 3]}}, small, ((torch.randn(5, 6),), {})).right


def test_softmax_leaves_removed_scores_out():
    scores = torch.tensor([[1.0, 0.0, 2.0], [0.5, 0.0, -1.0]])
    out = run_masked(nn.Identity(), lambda: scores.softmax(-1), everywhere=False)
    assert torch.allclose(out[:, [0, 2]], scores[:, [0, 2]].softmax(-1))


def test_the_control_fails_where_nothing_shows():
    model, small = normed(nn.LayerNorm(8))
    with torch.no_grad():
        model.fc2.weight.zero_()
        small.fc2.weight.zero_()
    zoo = ZooModel(
        "torchvision", "normed", "mlp", lambda: model, lambda *_: ((torch.ones(5, 6),), {})
    )
    assert not _control(model, REMOVED, small, zoo)
    with torch.no_grad():
        model.fc2.weight.normal_()
        small.fc2.weight.copy_(model.fc2.weight[:, KEPT])
    assert _control(model, REMOVED, small, zoo)


def test_every_model_of_the_zoo_has_a_group():
    groups = {group(model) for model in load_zoo()}
    assert groups <= set(GROUPS)
    assert "other" not in groups


def tiny():
    layers = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(6 * 16, 5)),
    )
    return randomise(layers, image_inputs(8)(4, 7))


@pytest.mark.parametrize("side", ["ours", "peer"])
def test_both_sides_prune_a_plain_network_right(side, monkeypatch):
    pytest.importorskip("torch_pruning")
    zoo = ZooModel("torchvision", "tiny", "vgg", tiny, image_inputs(8))
    monkeypatch.setattr("benchmarks.prune._sides.load_zoo", lambda: (zoo,))
    outcome = Outcome(zoo.id, side)
    work(Task(zoo.id, side, 0.5, 60), outcome, lambda _: None)
    assert (outcome.status, outcome.detail) == ("right", "")
    assert outcome.reached > 0.99
    assert outcome.parameters_after < 0.6 * outcome.parameters_before
    assert outcome.control is (True if side == "ours" else None)


def test_outcomes_survive_their_file_and_fill_the_page(tmp_path):
    models = load_zoo()[:2]
    outcomes = [
        Outcome(models[0].id, "ours", "right", error=1e-9, reached=1.0, control=True),
        Outcome(models[0].id, "peer", "crash", "prune: IndexError: a | b"),
    ]
    write_outcomes(tmp_path / "x.json", outcomes)
    assert read_outcomes(tmp_path / "x.json") == outcomes
    page = render(models, {(o.model, o.side): o for o in outcomes}, command="c", ratio=0.5)
    assert "1 of 1 (100%)" in page
    assert "IndexError: a \\| b" in page
    assert models[1].id not in page


def test_the_plot_is_a_drawing():
    drawing = plot({"a": [("small", 100, 0.5), ("large", 390, 1.9)]})
    assert len(ElementTree.fromstring(drawing).findall("{*}circle")) == 2


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [8, 28])
def test_networks_of_the_quality_benchmark_give_classes(name, size):
    assert network(name, size, 0).eval()(torch.zeros(2, 1, size, size)).shape == (2, 10)


def test_the_quality_table_compares_the_best_of_each_side():
    cells = [
        Cell("digits", "ViT", 0, "2×", "Torch-Pruning: L1", dense=0.99, tuned=0.9),
        Cell("digits", "ViT", 0, "2×", "Torch-Pruning: L2", dense=0.99, tuned=0.92),
        Cell("digits", "ViT", 0, "2×", "ours: uniform, L2", dense=0.99, tuned=0.95),
    ]
    page = _render(cells)
    assert "**92.00**" in page
    assert "+3.00" in page
