"""Processes that train together give what one alone gives, and end together."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.train import joined
from tests.train.processes import finish, start
from tests.train.worker import WAYS, model, trained

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def both(folder, task, **environment):
    ended = finish(start(["-m", "tests.train.worker", task, folder], **environment))
    assert [code for code, _, _ in ended] == [0, 0], ended
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes found, and their folder."""
    folder = tmp_path_factory.mktemp("two")
    return both(folder, "ways"), folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """What each of two processes found that have half of the weights each, and their folder."""
    folder = tmp_path_factory.mktemp("sharded")
    return both(folder, "sharded", **FSDP2), folder


def close(ours, theirs, atol=2e-6):
    """Whether two trainings came to the same weights and history, but for rounding."""
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, weights in theirs["weights"].items():
        assert torch.allclose(
            torch.tensor(ours["weights"][name]), torch.tensor(weights), atol=atol
        ), name
    for mine, other in zip(ours["history"], theirs["history"], strict=True):
        assert mine.keys() == other.keys()
        for name in ("epoch", "step", "samples"):
            assert mine[name] == other[name]
        for name in ("loss", "metric", "lr"):
            assert mine[name] == pytest.approx(other[name], rel=1e-5)


@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.parametrize("kind", ["two", "sharded"])
def test_two_processes_train_as_one_does(request, kind, way):
    two, _ = request.getfixturevalue(kind)
    assert two[0][way] == two[1][way]
    close(two[0][way], trained(way, model()))


def kept(folder):
    """Return what a training's last snapshot holds, but for the generators."""
    (path,) = folder.glob("step-*/tensors.safetensors")
    return {name: t for name, t in load_file(path).items() if "generators" not in name}


@pytest.mark.parametrize("way", ["taps", "hooked", "peer"])
def test_processes_with_half_of_the_weights_train_as_one_does(sharded, tmp_path, way):
    found, folder = sharded
    assert found[0][way] == found[1][way]
    close(found[0][way], joined.trained(way, tmp_path))
    ours, theirs = kept(folder / way), kept(tmp_path)
    assert ours.keys() == theirs.keys()
    assert any(part in name for name in ours for part in ("objective.projectors", "objective.peer"))
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=2e-6), name


def test_batch_norms_train_alike_with_half_of_the_weights(two, sharded):
    """Each process has statistics of its own rows, so that one alone ends elsewhere."""
    close(sharded[0][0]["norms"], two[0][0]["norms"])


def test_fp16_leaves_out_the_same_steps_with_half_of_the_weights(two, sharded):
    """One process alone rounds whole batches, and may leave out another step."""
    found, _ = sharded
    assert found[0]["fp16"] == found[1]["fp16"]
    close(found[0]["fp16"], two[0][0]["fp16"], atol=2e-5)


@pytest.mark.parametrize("kind", ["two", "sharded"])
def test_two_killed_processes_resume_to_the_same_bits(request, kind):
    two, _ = request.getfixturevalue(kind)
    whole, resumed = two[0]["resumed"]
    assert whole == resumed
    assert two[1]["resumed"] == two[0]["resumed"]
    without_dropout = two[0]["average" if kind == "two" else "taps"]
    assert whole["history"] != without_dropout["history"]


def test_a_process_that_dies_ends_the_others_with_one_clear_error(tmp_path):
    first, second = finish(start(["-m", "tests.train.worker", "dies", tmp_path]))
    assert second[0] == 9
    assert first[0] == 1
    assert first[1].startswith("WorkerError: process 0 of 2 lost the others"), first


def test_processes_that_were_told_different_things_say_so(two):
    for each in two[0]:
        assert "the processes were told different things" in each["differs"]
        assert "epochs: 1, 2" in each["differs"]
