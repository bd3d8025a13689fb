"""Compensation: exact where it can be, and less error than plain removal."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxcompress.errors import DataError, NumericsError
from fxcompress.pipeline.context import Context
from fxcompress.rewrite import GraphRewriter
from fxcompress.rewrite.shrink import shrink
from passes.prune._compensate.options import Compensation
from passes.prune._compensate.refit import compensate
from passes.prune._criteria.options import Criterion
from passes.prune._criteria.score import score
from tests.passes.models import ResNet, Transformer, image_batches, token_batches
from tests.passes.prune.nets import Attention, Joined, Plain, Task


def shrunk(task, keep, values=None):
    """Return the pruned Program, with compensated tensors in it."""
    rewriter = GraphRewriter(task.program)
    shrink(rewriter, task.analysis, keep)
    for name, value in (values or {}).items():
        rewriter.set_tensor(name, value)
    return rewriter.finish()


def made_up(task, keep, method, **options):
    """Return what compensation gives, and the Program with it."""
    chosen = Compensation(method=method, **{"samples": task.samples, **options})
    pruned = shrunk(task, keep)
    before = pruned.fingerprint(), task.program.fingerprint()
    found = compensate(task.program, pruned, task.analysis, keep, chosen, task.context)
    assert (pruned.fingerprint(), task.program.fingerprint()) == before
    return found, shrunk(task, keep, found.values)


def half(task, kinds=("channel", "neuron", "head_width", "residual")):
    """Return the better half of each axis of some kinds."""
    axes = [axis for axis in task.analysis.axes if axis.kind in kinds]
    scores = score(task.program, task.analysis, axes, Criterion(), task.context)
    return {a: np.sort(np.argsort(-scores[a])[: (a.size + 1) // 2]) for a in axes}


def error(task, program, batches):
    """Return the mean squared error of outputs over their variance."""
    with torch.no_grad():
        pairs = [(task.model(*batch), program(*batch)) for batch in batches]
    return sum(float((a - b).square().mean()) for a, b in pairs) / sum(
        float(a.var()) for a, _ in pairs
    )


MODELS = {
    "plain": (Plain, lambda n, s: image_batches(n, 16, 3, 3, 3, seed=s)),
    "resnet": (lambda: ResNet(8), lambda n, s: image_batches(n, 4, 3, 12, 12, seed=s)),
    "concat": (Joined, lambda n, s: image_batches(n, 16, 3, 6, 6, seed=s)),
    "attention": (Attention, lambda n, s: image_batches(n, 16, 7, 8, seed=s)),
    "transformer": (lambda: Transformer(16, 2, 4), lambda n, s: token_batches(n, 16, 8, seed=s)),
}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_of_unseen_data_come_closer(name):
    build, batches = MODELS[name]
    kinds = ("channel", "neuron", "head_width")
    better = []
    for seed in range(3):
        task = Task(build, batches(6, 0), seed=seed)
        keep = half(task, kinds)
        unseen = batches(2, 1)
        plain = error(task, shrunk(task, keep), unseen)
        found, mended = made_up(task, keep, "least_squares")
        assert found.values
        _, shifted = made_up(task, keep, "bias")
        assert error(task, mended, unseen) < plain
        better.append((error(task, shifted, unseen), error(task, mended, unseen), plain))
    shifted, mended, plain = np.mean(better, axis=0)
    assert mended < shifted < plain


@pytest.mark.parametrize("method", ["bias", "least_squares"])
def test_constant_channels_are_absorbed_exactly(method):
    class Constant(nn.Module):
        """Channels 1 and 3 of each layer do not depend on the input."""

        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 2, bias=False)
            self.norm, self.fc1 = nn.BatchNorm2d(4), nn.Linear(4, 4)
            self.fc2 = nn.Linear(4, 5)

        def forward(self, x):
            x = F.relu(self.norm(self.conv2(F.relu(self.conv1(x)))))
            return self.fc2(F.relu(self.fc1(x.mean((2, 3)))))

    task = Task(Constant, image_batches(2, 4, 3, 6, 6))
    with torch.no_grad():
        for weight, bias in (
            (task.model.conv1.weight, task.model.conv1.bias),
            (task.model.fc1.weight, task.model.fc1.bias),
        ):
            weight[[1, 3]] = 0
            bias[[1, 3]] = torch.tensor([0.7, 2.0])
    keep = {task.axis(f"{name}.weight[0]"): np.array([0, 2]) for name in ("conv1", "fc1")}
    unseen = image_batches(2, 4, 3, 6, 6, seed=9)
    assert error(task, shrunk(task, keep), unseen) > 1e-3
    found, mended = made_up(task, keep, method)
    assert error(task, mended, unseen) < 1e-9
    assert {"norm.running_mean", "fc2.bias"} <= set(found.values)


def test_a_channel_that_others_add_up_to_is_not_missed():
    task = Task(Plain, image_batches(8, 16, 3, 3, 3))
    with torch.no_grad():
        # Neuron 6 is the sum of 0 and 1 where these are positive, which they are here.
        task.model.fc1.weight[6] = task.model.fc1.weight[0] + task.model.fc1.weight[1]
        task.model.fc1.bias[:2] = 30.0
        task.model.fc1.bias[6] = 60.0
    keep = {task.axis("fc1.weight[0]"): np.arange(6)}
    unseen = image_batches(2, 16, 3, 3, 3, seed=4)
    found, mended = made_up(task, keep, "least_squares", ridge=1e-9)
    assert error(task, mended, unseen) < 1e-6
    column = task.model.fc2.weight.detach()
    wanted = column[:, :6].clone()
    wanted[:, :2] += column[:, 6:]
    torch.testing.assert_close(found.values["fc2.weight"], wanted, rtol=1e-3, atol=1e-3)


def test_the_refit_is_the_least_squares_solution():
    task = Task(Plain, image_batches(8, 16, 3, 3, 3))
    keep = {task.axis("fc1.weight[0]"): np.array([0, 2, 3, 6])}
    found, _ = made_up(task, keep, "least_squares", ridge=1e-9)
    with torch.no_grad():
        seen = []
        handle = task.model.fc2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        y = torch.cat([task.model(*batch) for batch in task.batches]).double()
        handle.remove()
    x = torch.cat(seen).double()[:, [0, 2, 3, 6]]
    design = torch.cat([x, torch.ones(len(x), 1)], 1)
    wanted = torch.linalg.lstsq(design, y).solution
    torch.testing.assert_close(
        found.values["fc2.weight"].double(), wanted[:-1].T, rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(found.values["fc2.bias"].double(), wanted[-1], rtol=1e-3, atol=1e-4)


def test_a_large_ridge_leaves_the_weights():
    task = Task(Plain, image_batches(4, 8, 3, 3, 3))
    keep = half(task)
    held, _ = made_up(task, keep, "least_squares", ridge=1e9)
    shifted, _ = made_up(task, keep, "bias")
    for name, value in shifted.values.items():
        torch.testing.assert_close(held.values[name], value, rtol=1e-4, atol=1e-5)
    sliced = shrunk(task, keep).state()
    for name in ("conv2.weight", "fc1.weight", "fc2.weight"):
        torch.testing.assert_close(held.values[name], sliced[name], rtol=1e-4, atol=1e-5)


def test_what_reads_a_pruned_axis_and_nothing_else_changes():
    task = Task(lambda: ResNet(4), image_batches(2, 4, 3, 8, 8))
    keep = {task.axis("layer1.0.conv1.weight[0]"): np.array([0, 3])}
    found, mended = made_up(task, keep, "least_squares")
    assert set(found.values) == {"layer1.0.conv2.weight", "layer1.0.bn2.running_mean"}
    plain = shrunk(task, keep).state()
    for name, value in mended.state().items():
        same = torch.equal(value, plain[name])
        assert same == (name not in found.values)


def test_groups_are_declined_with_a_reason():
    task = Task(Joined, image_batches(2, 4, 3, 6, 6))
    axis = next(a for a in task.analysis.axes if "grouped.weight[1]" in map(str, a.places))
    found, _ = made_up(task, {axis: np.arange(axis.size - 1)}, "least_squares")
    assert "grouped" in {each.node for each in found.declined}
    assert "groups" in next(e.reason for e in found.declined if e.node == "grouped")


def test_a_layer_that_is_called_twice_is_declined():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 5)

        def forward(self, x):
            for _ in range(2):
                x = self.down(F.relu(self.up(x)))
            return self.head(x)

    task = Task(Twice, image_batches(2, 4, 6))
    found, _ = made_up(task, {task.axis("up.weight[0]"): np.arange(4)}, "least_squares")
    assert not found.values
    assert ["more than once" in each.reason for each in found.declined] == [True]


def test_a_layer_without_bias_or_norm_has_no_place_for_the_mean():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 5, bias=False)

        def forward(self, x):
            return self.down(F.relu(self.up(x)))

    task = Task(Bare, image_batches(4, 16, 6))
    keep = {task.axis("up.weight[0]"): np.arange(5)}
    found, _ = made_up(task, keep, "bias")
    assert not found.values
    assert "bias" in found.declined[0].reason
    found, mended = made_up(task, keep, "least_squares")
    assert set(found.values) == {"down.weight"}
    assert error(task, mended, task.batches) < error(task, shrunk(task, keep), task.batches)


def test_missing_and_broken_data():
    task = Task(Plain, image_batches(1, 4, 3, 3, 3))
    keep = half(task)
    task.context = Context()
    with pytest.raises(DataError, match="needs a split calibration"):
        made_up(task, keep, "bias")
    task.context = Context(data={"calibration": [(torch.full((4, 3, 3, 3), float("inf")),)]})
    with pytest.raises(NumericsError, match="conv2"):
        made_up(task, keep, "least_squares")
    assert not made_up(task, keep, "none")[0].values
