"""Criteria of gradients against finite differences and gradients of single samples."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fxcompress.axes import analyze
from fxcompress.errors import DataError
from fxcompress.ir import capture
from fxcompress.pipeline.context import Context
from passes.prune._criteria.options import Criterion
from passes.prune._criteria.score import score
from tests.passes.models import image_batches
from tests.passes.prune.nets import Language, Plain, Task, hidden, scored
from tests.passes.support import seeded


def readers_scaled(model, axis, index, factor):
    """Return the model's parameters with what reads an index multiplied by a factor."""
    state = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    for place in axis.places:
        if place.role == "in":
            tensor = state[place.tensor].movedim(place.dim, 0)
            tensor.reshape(axis.size, -1, *tensor.shape[1:])[index] *= factor
    return state


@pytest.mark.parametrize("name", ["conv1.weight[0]", "conv2.weight[0]", "fc1.weight[0]"])
def test_taylor_is_the_slope_of_the_loss(name):
    task = Task(Plain, image_batches(1, 8, 3, 3, 3), double=True)
    axis, step = task.axis(name), 1e-6

    def losses(index, factor):
        state = readers_scaled(task.model, axis, index, factor)
        logits = torch.func.functional_call(task.model, state, task.batches[0])
        return F.cross_entropy(logits, task.labels[0], reduction="none").detach()

    slopes = [
        ((losses(i, 1 + step) - losses(i, 1 - step)) / (2 * step)).abs().mean()
        for i in range(axis.size)
    ]
    np.testing.assert_allclose(scored(task, name, "taylor"), slopes, rtol=1e-3, atol=1e-7)


def per_sample(task, name):
    """Yield each sample's gradient of one parameter of the model."""
    weight = dict(task.model.named_parameters())[name]
    for (x,), labels in zip(task.batches, task.labels, strict=True):
        for sample, label in zip(x, labels, strict=True):
            loss = F.cross_entropy(task.model(sample[None]), label[None])
            yield torch.autograd.grad(loss, weight)[0].double()


def test_obd_weighs_squares_by_the_diagonal_of_fisher(plain):
    squares = torch.stack([g.square() for g in per_sample(plain, "conv2.weight")]).mean(0)
    wanted = 0.5 * (squares * plain.model.conv2.weight.detach().square()).sum((0, 2, 3))
    np.testing.assert_allclose(scored(plain, "conv1.weight[0]", "obd"), wanted, rtol=1e-4)


def test_fisher_squares_the_contribution_of_the_group(plain):
    weight = plain.model.conv2.weight.detach()
    joint = torch.stack([(g * weight).sum((0, 2, 3)) for g in per_sample(plain, "conv2.weight")])
    wanted = 0.5 * joint.square().mean(0)
    np.testing.assert_allclose(scored(plain, "conv1.weight[0]", "fisher"), wanted, rtol=1e-4)


def test_without_labels_the_size_of_the_output_is_the_loss():
    task = Task(Plain, image_batches(1, 8, 3, 3, 3), labels=False)
    weight = task.model.fc2.weight
    slopes = []
    for sample in task.batches[0][0]:
        loss = 0.5 * task.model(sample[None]).square().sum()
        (gradient,) = torch.autograd.grad(loss, weight)
        slopes.append((gradient * weight).sum(0).abs().detach())
    wanted = torch.stack(slopes).mean(0)
    np.testing.assert_allclose(scored(task, "fc1.weight[0]", "taylor"), wanted, rtol=1e-4)


def test_without_labels_obd_is_the_diagonal_of_gauss_newton():
    # Many copies of one sample: the mean over random probes comes close to its expectation.
    x = image_batches(1, 1, 3, 3, 3)[0][0].repeat(400, 1, 1, 1)
    task = Task(Plain, [(x,)], labels=False)
    read = hidden(task, task.model.fc2)[0].double()
    wanted = 0.5 * task.model.fc2.weight.detach().double().square().sum(0) * read.square()
    np.testing.assert_allclose(scored(task, "fc1.weight[0]", "obd"), wanted, rtol=0.3, atol=1e-12)


def test_a_language_model_predicts_its_next_tokens():
    ids = torch.randint(0, 20, (4, 9), generator=torch.Generator().manual_seed(0))
    task = Task(Language, [(ids,)], labels=False)
    weight = task.model.head.weight
    slopes = []
    for row in ids:
        loss = F.cross_entropy(task.model(row[None])[0, :-1], row[1:])
        (gradient,) = torch.autograd.grad(loss, weight)
        slopes.append((gradient * weight).sum(0).abs().detach())
    wanted = torch.stack(slopes).mean(0)
    np.testing.assert_allclose(scored(task, "up.weight[0]", "taylor"), wanted, rtol=1e-4)
    given = Context(data={"calibration": [((ids,), ids)]})
    criterion = Criterion(name="taylor", samples=4)
    axis = task.axis("up.weight[0]")
    again = score(task.program, task.analysis, [axis], criterion, given)[axis]
    np.testing.assert_allclose(again, wanted, rtol=1e-4)


def test_labels_of_another_shape_are_refused(plain):
    data = [(batch, torch.zeros(len(batch[0]), 3, 2)) for batch in plain.batches]
    with pytest.raises(DataError, match="do not agree"):
        score(
            plain.program, plain.analysis, plain.analysis.axes,
            Criterion(name="taylor", samples=4), Context(data={"calibration": data}),
        )  # fmt: skip


def test_a_fixed_batch_is_taken_whole():
    model = seeded(Plain)
    batches = image_batches(3, 4, 3, 3, 3)
    labels = torch.tensor([0, 1, 2, 3])
    program = capture(model, batches[0], dynamic={})
    analysis = analyze(program)
    context = Context(data={"calibration": [(batch, labels) for batch in batches]})
    axis = analysis.axis("fc1.weight[0]")
    wanted = 0.0
    for batch in batches:
        loss = F.cross_entropy(model(*batch), labels)
        (gradient,) = torch.autograd.grad(loss, model.fc2.weight)
        wanted += 0.5 * (gradient * model.fc2.weight).sum(0).detach().square() / len(batches)
    got = score(program, analysis, [axis], Criterion(name="fisher", samples=12), context)[axis]
    np.testing.assert_allclose(got, wanted, rtol=1e-4)
