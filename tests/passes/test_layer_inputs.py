"""The inputs of a layer, times its weight as matrices, are the layer's outputs."""

import pytest
import torch
from torch import nn

from fxcompress.ir import capture
from passes._layers.inputs import input_rows
from passes._layers.stream import stream
from passes._layers.weights import find_weights
from passes.prune.unstructured import Unstructured
from tests.passes.prune.sparse import Products, olmoe
from tests.passes.support import random_input, seeded

OPTIONS = Unstructured.Options(ratio=0.5)


def inputs_of(program, batch):
    """Return tensor -> its weight's form, and the inputs of each call."""
    weights, _ = find_weights(program, OPTIONS)
    readers = {reader.node: (each, reader) for each in weights for reader in each.readers}
    found = {each.tensor: (each.form, []) for each in weights}
    state = program.state()

    def see(node, env):
        weight, reader = readers[node]
        shape = state[weight.tensor].shape
        found[weight.tensor][1].extend(input_rows(reader, weight.form, shape, env))

    stream(program, [batch], readers, see)
    return found


LAYERS = [
    (lambda: nn.Conv1d(4, 6, 3, groups=2, stride=2, padding=1, bias=False), (3, 4, 9)),
    (lambda: nn.Conv2d(4, 6, (3, 5), padding="same", bias=False), (2, 4, 7, 6)),
    (lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular", bias=False), (2, 4, 7, 6)),
    (lambda: nn.Conv2d(4, 8, 3, groups=4, dilation=2, bias=False), (2, 4, 7, 7)),
    (lambda: nn.Conv3d(2, 4, (1, 2, 3), bias=False), (2, 2, 4, 5, 6)),
    (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1, bias=False), (2, 4, 9)),
    (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2, padding=1, bias=False), (2, 4, 5, 4)),
    (lambda: nn.ConvTranspose3d(2, 3, 2, dilation=2, bias=False), (1, 2, 3, 3, 3)),
    (lambda: nn.Linear(8, 6, bias=False), (2, 3, 8)),
]


@pytest.mark.parametrize(("build", "shape"), LAYERS)
def test_of_every_kind_of_layer(build, shape):
    x = random_input(*shape)
    program = capture(seeded(lambda: nn.Sequential(build())), (x,))
    ((form, calls),) = inputs_of(program, (x,)).values()
    weight = program.state()["0.weight"]
    outputs = []
    for groups, rows in calls:
        made = rows @ form.rows(weight)[groups].transpose(1, 2)
        outputs.append(made.movedim(0, 1).flatten(1))
    expected = program(x) if form.taps == () else program(x).movedim(1, -1)
    assert torch.allclose(torch.cat(outputs), expected.flatten(0, -2), atol=1e-5)
    assert torch.equal(form.weight(form.rows(weight), weight), weight)


def test_of_free_weights_in_products():
    x = random_input(8, 5, 6)
    program = capture(seeded(Products), (x,))
    state, found = program.state(), inputs_of(program, (x,))
    _, left, experts, batch, free, _ = program(x)
    made = {
        name: sum(
            rows @ form.rows(state[name])[groups].transpose(1, 2) for groups, rows in calls[:1]
        )
        for name, (form, calls) in found.items()
    }
    assert torch.allclose(made["left"][0].reshape(8, 5, 5).sum(-1), left, atol=1e-5)
    assert torch.allclose(made["free"][0].reshape(8, 5, 4), free, atol=1e-5)
    assert torch.allclose(made["batch"].reshape(3, 8, 5, 4).movedim(0, 1), batch, atol=1e-5)
    form, calls = found["experts"]
    matrices = form.rows(state["experts"])
    each = [rows @ matrices[groups].transpose(1, 2) for groups, rows in calls]
    assert [groups.start for groups, _ in calls] == [0, 1, 2]
    assert torch.allclose(sum(each)[0].reshape(8, 5, 4), experts, atol=1e-5)


def test_tokens_reach_the_expert_that_they_are_routed_to():
    ids = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(3))
    program = olmoe()
    name = "model.model.layers.0.mlp.experts.gate_up_proj"
    form, calls = inputs_of(program, (ids,))[name]
    rows = sum(part.shape[1] for _, part in calls)
    assert rows == 2 * 12 * 2  # two experts per token
    assert form.rows(program.state()[name]).shape == (4, 32, 32)
    assert len({groups.start for groups, _ in calls}) > 1
