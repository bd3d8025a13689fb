"""Cached outputs: what a teacher said, found again for shuffled samples, and bad folders."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fxcompress.errors import DataError, RunFolderError, UsageError
from fxcompress.train import CachedOutputs, FitConfig, cache_outputs, fit
from fxcompress.train.cached import check_cached


class Model(nn.Module):
    def __init__(self, classes=7):
        super().__init__()
        self.linear, self.drop = nn.Linear(4, classes), nn.Dropout(0.5)

    def forward(self, x, scale=None):
        y = self.linear(self.drop(x))
        return y if scale is None else y * scale[:, None]


def teacher():
    torch.manual_seed(0)
    return Model().train()


def batches(count=5, size=4):
    generator = torch.Generator().manual_seed(1)
    return [
        ((torch.randn(size, 4, generator=generator),), torch.arange(size) % 7) for _ in range(count)
    ]


@pytest.mark.parametrize("shard", [3, 8, 100])
def test_shuffled_samples_find_their_logits(tmp_path, shard):
    model = teacher()
    cached = CachedOutputs(cache_outputs(model, batches(), tmp_path / "out", shard=shard))
    assert model.training, "modes are left as they were"
    x = torch.cat([batch[0] for batch, _ in batches()])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    said = torch.cat([model.eval()(*batch).detach() for batch, _ in batches()])
    assert torch.equal(cached(x[order]), said[order])
    assert cached.shape == (7,)


def test_named_batches_are_those_of_positions(tmp_path):
    data = [{"x": x, "scale": torch.arange(4.0)} for ((x,), _) in batches()]
    cached = CachedOutputs(cache_outputs(teacher(), data, tmp_path / "out"))
    first = data[0]
    assert torch.equal(cached(scale=first["scale"], x=first["x"]), teacher().eval()(**first))
    with pytest.raises(DataError, match="no cached output"):
        cached(x=first["x"], scale=first["scale"] + 1)


def test_of_the_largest_logits_only_those_are_known(tmp_path):
    model = teacher()
    cached = CachedOutputs(cache_outputs(model, batches(), tmp_path / "out", top_k=3))
    x = batches()[0][0][0]
    whole, found = model.eval()(x).detach(), cached(x)
    kept = found > float("-inf")
    assert kept.sum(1).tolist() == [3] * 4
    assert torch.equal(found[kept], whole[kept])
    assert torch.equal(found.topk(3).indices, whole.topk(3).indices)
    assert (tmp_path / "out/shard-00000.safetensors").exists()
    assert load_file(tmp_path / "out/shard-00000.safetensors")["places"].dtype == torch.int32


@pytest.mark.parametrize("top_k", [None, 4])
def test_a_student_learns_from_them(tmp_path, top_k):
    model = teacher().eval()
    cached = CachedOutputs(cache_outputs(model, batches(), tmp_path / "out", top_k=top_k))
    config = FitConfig.model_validate(
        {"steps": 6, "shuffle": "samples", "losses": [{"use": "soft_labels"}]}
    )

    def trained(known):
        torch.manual_seed(3)
        student = Model()
        fit(student, config, batches(), teacher=known)
        return student.state_dict()

    direct, kept = trained(model), trained(cached)
    same = all(torch.allclose(direct[name], kept[name], atol=1e-7) for name in direct)
    assert same == (top_k is None)


# -- bad input ---------------------------------------------------------------------------------


def test_a_folder_that_is_missing_or_damaged(tmp_path):
    with pytest.raises(RunFolderError, match="holds no outputs"):
        CachedOutputs(tmp_path / "gone")
    folder = cache_outputs(teacher(), batches(), tmp_path / "out")
    shard = folder / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(RunFolderError, match="are damaged") as caught:
        CachedOutputs(folder)
    assert "shard-00000.safetensors" in caught.value.reason
    shard.unlink()
    with pytest.raises(RunFolderError, match="are damaged"):
        CachedOutputs(folder)
    (folder / "outputs.json").write_text(json.dumps({"format": 9}))
    with pytest.raises(RunFolderError, match="damaged") as caught:
        CachedOutputs(folder)
    assert "format is 9" in caught.value.reason


def test_outputs_must_be_alike_and_there_must_be_some(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return x[:, : int(x.sum() > 0) + 1]

    data = [(torch.ones(2, 4),), (-torch.ones(2, 4),)]
    with pytest.raises(DataError, match="differ in shape"):
        cache_outputs(Odd(), data, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="nothing to run"):
        cache_outputs(Odd(), [], tmp_path / "out")


def test_outputs_of_another_model_are_refused(tmp_path):
    cached = CachedOutputs(cache_outputs(teacher(), batches(), tmp_path / "out"))
    check_cached(cached, (None, 7))
    with pytest.raises(UsageError, match="of another model") as caught:
        check_cached(cached, (None, 10))
    assert "[7] values per sample, the student [10]" in caught.value.reason
