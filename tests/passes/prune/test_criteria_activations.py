"""Criteria of activations against hooks on the model."""

import numpy as np
from torch.nn import functional as F

from passes.prune._criteria.options import Criterion
from passes.prune._criteria.score import score
from tests.passes.models import image_batches
from tests.passes.prune.nets import Attention, Task, hidden, scored


def test_activation_norm_and_apoz_against_hooks(plain):
    conv, flat = hidden(plain, plain.model.conv2), hidden(plain, plain.model.fc1)
    flat = flat.reshape(len(flat), 4, 9)
    for axis, x, others in (
        ("conv1.weight[0]", conv, (0, 2, 3)),
        ("conv2.weight[0]", flat, (0, 2)),
    ):
        rms = x.double().square().mean(others).sqrt()
        np.testing.assert_allclose(scored(plain, axis, "activation_norm"), rms, rtol=1e-5)
        alive = (x != 0).double().mean(others)
        assert ((0 < alive) & (alive < 1)).any()
        np.testing.assert_allclose(scored(plain, axis, "apoz"), alive, rtol=1e-9)


def test_wanda_multiplies_weights_with_norms_of_inputs(plain):
    rms = hidden(plain, plain.model.fc1).square().mean(0).sqrt()
    wanted = (plain.model.fc1.weight.detach().abs() * rms).sum(0).reshape(4, 9).sum(1)
    np.testing.assert_allclose(scored(plain, "conv2.weight[0]", "wanda"), wanted, rtol=1e-5)
    x = hidden(plain, plain.model.conv2)
    patches = F.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 6 * 9)
    rms = patches.square().mean(0).sqrt().reshape(6, 3, 3)
    wanted = (plain.model.conv2.weight.detach().abs() * rms).sum((0, 2, 3))
    np.testing.assert_allclose(scored(plain, "conv1.weight[0]", "wanda"), wanted, rtol=1e-5)


def test_concatenated_axes_find_their_own_part(joined):
    x, weight = hidden(joined, joined.model.mix), joined.model.mix.weight.detach()
    for axis, part in (("left.weight[0]", slice(0, 4)), ("right.weight[0]", slice(4, 10))):
        rms = x[:, part].double().square().mean((0, 2, 3)).sqrt()
        np.testing.assert_allclose(scored(joined, axis, "activation_norm"), rms, rtol=1e-5)
        columns = weight[:, part].abs().sum((0, 2, 3))
        got = scored(joined, axis, "l1", roles=("in",))
        np.testing.assert_allclose(got, columns, rtol=1e-5)


def test_the_axis_of_queries_and_keys_is_scored_where_they_are_made():
    task = Task(Attention, image_batches(2, 4, 7, 8))
    widths = [axis for axis in task.analysis.axes if not any(p.role == "in" for p in axis.places)]
    assert widths
    for name in ("taylor", "wanda", "activation_norm"):
        criterion = Criterion(name=name, samples=task.samples)
        for axis, found in score(
            task.program, task.analysis, widths, criterion, task.context
        ).items():
            assert found.shape == (axis.size,)
            assert (found > 0).all()
