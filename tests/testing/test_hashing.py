import hashlib

import pytest
import torch
from torch import nn

from fxcompress.errors import UsageError
from fxcompress.ir import capture
from fxcompress.testing import hash_inputs, hash_values, hash_weights_
from tests.ir.small_models import SmallCnn, SmallTransformer, small_cnn, small_transformer


def test_values_are_fixed_for_all_time():
    values = hash_values((2, 3), "key")
    assert (values * 2**15).tolist() == [[8723, 4795, -26755], [-13150, -26011, 24886]]


def test_values_agree_with_a_plain_hash():
    seed, mask = int.from_bytes(hashlib.sha256(b"a").digest()[:4], "little"), 0xFFFFFFFF
    expected = []
    for place in range(100):
        x = (place * 0x9E3779B1 + seed) & mask
        x = ((x ^ x >> 16) * 0x85EBCA6B) & mask
        x = ((x ^ x >> 13) * 0xC2B2AE35) & mask
        expected.append(((x ^ x >> 16) % 2**16 - 2**15) / 2**15)
    assert hash_values((100,), "a").tolist() == expected


def test_values_are_uniform_and_exact():
    values = hash_values((200, 500), "anything")
    assert values.min() >= -1
    assert values.max() < 1
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 3**-0.5) < 0.01
    assert torch.equal(values * 2**15, (values * 2**15).round())
    neighbours = (values[:, 1:] * values[:, :-1]).mean()
    assert abs(neighbours) < 0.01


def test_weights_depend_on_name_and_seed_alone():
    a, b = hash_weights_(SmallCnn()), hash_weights_(SmallCnn())
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    other = hash_weights_(SmallCnn(), seed=1)
    assert not torch.equal(a.fc.weight, other.fc.weight)
    assert not torch.equal(a.layers[0].conv1.weight, a.layers[1].conv1.weight)


def test_scales():
    model = hash_weights_(nn.Sequential(nn.Linear(768, 512), nn.BatchNorm1d(512)))
    linear, norm = model
    assert 0.5 < linear.weight.std() * 768**0.5 < 1.5
    assert norm.running_var.min() >= 0.5
    assert 0.7 < norm.weight.mean() < 1.3
    assert norm.num_batches_tracked == 0
    assert linear.bias.abs().max() <= 0.125


def test_other_buffers_and_ties_are_left():
    model = hash_weights_(SmallTransformer())
    assert torch.equal(model.offsets, torch.arange(12))
    assert model.head.weight is model.embed.weight


def test_program_and_model_get_the_same():
    program = small_cnn()
    assert hash_weights_(program) is program
    assert torch.equal(program.module.fc.weight, hash_weights_(SmallCnn()).fc.weight)


def test_meta_weights_are_refused():
    with pytest.raises(UsageError, match="weight is on the meta device"):
        hash_weights_(nn.Linear(2, 2, device="meta"))


def test_inputs():
    inputs = hash_inputs(small_transformer(), {"batch": 4, "seq": 9})
    assert list(inputs) == ["ids", "mask"]
    assert inputs["ids"].shape == inputs["mask"].shape == (4, 9)
    assert inputs["ids"].dtype == torch.int64
    assert inputs["ids"].max() < 20
    assert inputs["ids"].unique().numel() > 10
    assert set(inputs["mask"].unique().tolist()) == {0, 1}
    assert inputs["mask"][:, 0].all()
    program = small_cnn()
    x = hash_inputs(program)["x"]
    assert x.shape == (program.dims["batch"].example, 3, 16, 16)
    assert not torch.equal(x, hash_inputs(program, seed=1)["x"])


def test_float64_and_bool_inputs():
    class Where(nn.Module):
        def forward(self, x, keep):
            return torch.where(keep, x, 0.0)

    program = capture(Where(), (torch.zeros(2, 3, dtype=torch.float64), torch.ones(2, 3) > 0))
    inputs = hash_inputs(program)
    assert inputs["x"].dtype == torch.float64
    assert inputs["keep"].dtype == torch.bool
