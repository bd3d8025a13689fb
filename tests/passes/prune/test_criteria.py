"""What every criterion owes."""

import numpy as np
import pytest
import torch

import fxcompress
from fxcompress.axes import analyze
from fxcompress.errors import DataError, ModelError, NumericsError
from fxcompress.ir import capture
from fxcompress.pipeline.context import Context
from passes.prune._criteria.options import Criterion
from passes.prune._criteria.score import score, unscorable
from tests.passes.models import ResNet, Transformer, image_batches, token_batches
from tests.passes.prune.nets import (
    EVERY,
    WITH_DATA,
    Joined,
    Plain,
    Task,
    scored,
)
from tests.passes.support import seeded


@pytest.mark.parametrize("name", EVERY)
def test_every_criterion_on_other_architectures(name):
    tasks = [
        Task(lambda: ResNet(4), image_batches(2, 3, 3, 8, 8)),
        Task(Joined, image_batches(2, 3, 3, 6, 6)),
        Task(lambda: Transformer(16, 2, 4), token_batches(2, 3, 5), classes=7),
    ]
    for task in tasks:
        criterion = Criterion(name=name, samples=task.samples)
        without = unscorable(task.program, task.analysis.axes, criterion)
        axes = [axis for axis in task.analysis.axes if axis not in without]
        found = score(task.program, task.analysis, axes, criterion, task.context)
        assert list(found) == axes
        for axis, scores in found.items():
            assert scores.dtype == np.float64
            assert scores.shape == (axis.size,)
            assert np.isfinite(scores).all()
            assert (scores >= 0).all()


@pytest.mark.parametrize("name", [each for each in EVERY if each != "random"])
def test_scores_move_with_the_channels(plain, name):
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    moved = Task(Plain, plain.batches)
    with torch.no_grad():
        for tensor in (moved.model.conv1.weight, moved.model.conv1.bias, moved.model.bn1.weight,
                       moved.model.bn1.bias, moved.model.bn1.running_mean,
                       moved.model.bn1.running_var):  # fmt: skip
            tensor.copy_(tensor[order].clone())
        moved.model.conv2.weight.copy_(moved.model.conv2.weight[:, order].clone())
    got, before = (scored(task, "conv1.weight[0]", name) for task in (moved, plain))
    np.testing.assert_allclose(got, before[order.numpy()], rtol=1e-4, atol=1e-9)
    assert len(set(before.round(9))) > 1


@pytest.mark.parametrize("name", WITH_DATA)
def test_the_program_is_left_alone(plain, name):
    before = plain.program.fingerprint()
    flags = {name: p.requires_grad for name, p in plain.program.module.named_parameters()}
    plain.program.module.train()
    try:
        scored(plain, "conv1.weight[0]", name)
        assert all(module.training for module in plain.program.module.modules())
    finally:
        plain.program.module.eval()
    assert plain.program.fingerprint() == before
    for key, parameter in plain.program.module.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == flags[key]


def test_random_depends_on_seed_and_name_alone(plain):
    def draw(axes, seed):
        context = Context(seed=seed)
        return score(plain.program, plain.analysis, axes, Criterion(name="random"), context)

    axes = plain.analysis.axes
    first, backwards, other = draw(axes, 1), draw(axes[::-1], 1), draw(axes, 2)
    for axis in axes:
        np.testing.assert_array_equal(first[axis], backwards[axis])
        assert (first[axis] != other[axis]).any()


@pytest.mark.parametrize("name", WITH_DATA)
def test_missing_data_is_named_with_the_way_out(plain, name):
    with pytest.raises(DataError, match="needs a split calibration") as caught:
        score(plain.program, plain.analysis, plain.analysis.axes, Criterion(name=name), Context())
    assert "l2" in caught.value.hint


def test_a_nan_weight_is_named_with_its_axis():
    task = Task(Plain, image_batches(1, 2, 3, 3, 3))
    with torch.no_grad():
        task.model.conv2.weight[0, 2, 0, 0] = float("nan")
    for name in ("l1", "l2", "lamp", "fpgm"):
        with pytest.raises(NumericsError, match=r"axis conv\d.weight\[0\] is NaN") as caught:
            score(task.program, task.analysis, task.analysis.axes, Criterion(name=name), Context())
        assert caught.value.where == "conv2.weight"


@pytest.mark.parametrize("name", WITH_DATA)
def test_nan_data_is_an_error(plain, name):
    bad = [(torch.full((4, 3, 3, 3), float("nan")),)]
    context = Context(data={"calibration": [(bad[0], plain.labels[0])]})
    criterion = Criterion(name=name, samples=4)
    with pytest.raises(NumericsError, match=r"axis conv1.weight\[0\]"):
        score(plain.program, plain.analysis, plain.analysis.axes[:1], criterion, context)


def test_meta_weights_have_no_scores():
    with torch.device("meta"):
        model = Plain().eval()
    program = capture(model, (torch.empty(2, 3, 3, 3, device="meta"),))
    analysis = analyze(program)
    with pytest.raises(ModelError, match="meta"):
        score(program, analysis, analysis.axes, Criterion(), Context())


@pytest.mark.parametrize("name", WITH_DATA)
def test_named_inputs_with_a_mask(name):
    batches = token_batches(2, 4, 6, masked=True)
    program = capture(seeded(lambda: Transformer(16, 1, 4)), (), batches[0])
    analysis = analyze(program)
    axes = [axis for axis in analysis.axes if axis.kind == "neuron"]
    whole = Context(data={"calibration": batches})
    found = score(program, analysis, axes, Criterion(name=name, samples=8), whole)
    assert all(np.isfinite(each).all() for each in found.values())
    (gone,) = axes
    criterion = Criterion(name=name, samples=4)
    part = score(program, analysis, axes, criterion, Context(data={"calibration": batches[:1]}))
    same = np.allclose(part[gone], found[gone])
    # GELU gives no zeros: the share of them is the same for all data.
    assert same == (name == "apoz")


@pytest.fixture(scope="module")
def quantised(plain):
    steps = [{"use": "quantize.static", "calibration": 8}]
    data = {"calibration": plain.batches}
    return fxcompress.compress(plain.program, steps, data=data).program


@pytest.mark.parametrize("name", [each for each in EVERY if each not in ("bn_scale", "random")])
def test_a_quantised_graph_has_the_same_axes_to_score(name, plain, quantised):
    analysis = analyze(quantised)
    criterion = Criterion(name=name, samples=8)
    got = score(quantised, analysis, analysis.axes, criterion, plain.context)
    before = score(plain.program, plain.analysis, plain.analysis.axes, criterion, plain.context)
    assert [axis.name for axis in got] == [axis.name for axis in before]
    for scores, wanted in zip(got.values(), before.values(), strict=True):
        assert np.corrcoef(scores, wanted)[0, 1] > 0.9
