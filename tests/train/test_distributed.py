"""Processes that train together give what one alone gives, and end together."""

import json

import pytest
import torch

from tests.train.processes import finish, start
from tests.train.worker import WAYS, model, trained

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def both(folder, task, **environment):
    ended = finish(start(["-m", "tests.train.worker", task, folder], **environment))
    assert [code for code, _, _ in ended] == [0, 0], ended
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes found."""
    return both(tmp_path_factory.mktemp("two"), "ways")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """What each of two processes found that have half of the weights each."""
    return both(tmp_path_factory.mktemp("sharded"), "sharded", **FSDP2)


@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.parametrize("kind", ["two", "sharded"])
def test_two_processes_train_as_one_does(request, kind, way):
    two = request.getfixturevalue(kind)
    assert two[0][way] == two[1][way]
    if (kind, way) == ("sharded", "penalised"):
        assert "what a pass does in each step cannot train with sharded weights" in two[0][way]
        return
    expected = trained(way, model())
    for name, weights in expected["weights"].items():
        assert torch.allclose(
            torch.tensor(two[0][way]["weights"][name]), torch.tensor(weights), atol=2e-6
        )
    for ours, theirs in zip(two[0][way]["history"], expected["history"], strict=True):
        assert ours.keys() == theirs.keys()
        for name in ("epoch", "step", "samples"):
            assert ours[name] == theirs[name]
        for name in ("loss", "metric", "lr"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


@pytest.mark.parametrize("kind", ["two", "sharded"])
def test_two_killed_processes_resume_to_the_same_bits(request, kind):
    two = request.getfixturevalue(kind)
    whole, resumed = two[0]["resumed"]
    assert whole == resumed
    assert two[1]["resumed"] == two[0]["resumed"]
    assert whole["history"] != two[0]["average"]["history"]


def test_a_process_that_dies_ends_the_others_with_one_clear_error(tmp_path):
    first, second = finish(start(["-m", "tests.train.worker", "dies", tmp_path]))
    assert second[0] == 9
    assert first[0] == 1
    assert first[1].startswith("WorkerError: process 0 of 2 lost the others"), first


def test_processes_that_were_told_different_things_say_so(two):
    for each in two:
        assert "the processes were told different things" in each["differs"]
        assert "epochs: 1, 2" in each["differs"]
