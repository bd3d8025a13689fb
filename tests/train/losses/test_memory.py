"""`crd` against a memory of all samples: its value, what it remembers, and resumption."""

from dataclasses import replace

import pytest
import torch

from fxcompress.errors import DataError
from fxcompress.pipeline import Context
from fxcompress.train.loss_config import Crd
from fxcompress.train.losses import Outcome
from fxcompress.train.losses.memory import ContrastiveMemory
from passes.train.fit import Fit
from tests.passes.support import apply
from tests.passes.train.test_teachers import student, train_data, wider
from tests.train.joint.models import tapped

OPTIONS = {"use": "crd", "negatives": "memory", "samples": 24, "count": 30, "dim": 5}


def loss(**options):
    told = Crd.model_validate({**OPTIONS, **options})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return told, ContrastiveMemory(told, {"tap": ((4, 6), (4, 7))})


def outcome(index, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = (torch.randn(len(index), width, generator=generator) for width in (6, 7))
    target = {"index": torch.tensor(index)}
    return Outcome(None, None, (ours,), target, {"tap": ours}, {"tap": theirs}, {"tap": ours})


def test_it_is_the_formula_of_the_paper():
    """Noise-contrastive estimation with h = e^(g·M/τ)/Z, in loops."""
    options, module = loss()
    own, other = module.sides
    before = [side.memory.clone() for side in module.sides]
    given, index = outcome([3, 9, 0]), [3, 9, 0]
    torch.manual_seed(5)
    total, count = module(options, given, 0.0)
    total = total.detach()
    torch.manual_seed(5)
    drawn = torch.randint(24, (3, 30)).tolist()

    def embedded(side, tap):
        z = side.head(tap).detach()
        return z / z.norm(dim=1, keepdim=True)

    s, t = embedded(own, given.raw_taps["tap"]), embedded(other, given.teacher_taps["tap"])
    expected = 0.0
    for anchor, memory in ((s, before[1]), (t, before[0])):
        pairs = [[index[i], *drawn[i]] for i in range(3)]
        e = [[float((anchor[i] @ memory[j] / 0.07).exp()) for j in pairs[i]] for i in range(3)]
        z = 24 * sum(map(sum, e)) / (3 * 31)
        for row in e:
            shares = [value / z / (value / z + 30 / 24) for value in row]
            expected -= torch.tensor(shares[0]).log()
            expected -= sum(torch.tensor(1 - share).log() for share in shares[1:])
    assert count == 3
    torch.testing.assert_close(total, torch.as_tensor(float(expected)), rtol=1e-4, atol=1e-4)
    for side, g, old in zip(module.sides, (s, t), before, strict=True):
        rows = 0.5 * old[index] + 0.5 * g
        torch.testing.assert_close(side.memory[index], rows / rows.norm(dim=1, keepdim=True))
        others = [row for row in range(24) if row not in index]
        assert torch.equal(side.memory[others], old[others])


def test_constants_stay_and_a_run_without_gradients_changes_nothing():
    options, module = loss()
    with torch.no_grad():
        module(options, outcome([1, 2]), 0.0)
    assert not any(bool(side.constant) for side in module.sides)
    module(options, outcome([1, 2]), 0.0)
    first = [float(side.constant) for side in module.sides]
    module(options, outcome([5, 6], seed=1), 0.0)
    assert [float(side.constant) for side in module.sides] == first
    assert all(value > 0 for value in first)


def test_learning_tells_samples_from_one_another():
    options, module = loss(momentum=0.0, temperature=0.2)
    adam = torch.optim.Adam([p for p in module.parameters()], lr=0.02)
    given, losses = outcome(list(range(24))), []
    torch.manual_seed(0)
    for _ in range(60):
        total, count = module(options, given, 0.0)
        adam.zero_grad()
        (total / count).backward()
        adam.step()
        losses.append(float(total.detach()) / count)
    assert losses[-1] < 0.8 * losses[1]


def test_numbers_of_samples_are_needed_and_within_the_memory():
    options, module = loss()
    with pytest.raises(DataError, match="does not know which samples"):
        module(options, replace(outcome([0]), target=torch.tensor([0])), 0.0)
    with pytest.raises(DataError, match="none of the 24") as caught:
        module(options, outcome([0, 24]), 0.0)
    assert "from 0 to 24" in str(caught.value)
    for wrong in ({"samples": None}, {"negatives": "batch"}):
        with pytest.raises(ValueError, match="goes with `negatives: memory`"):
            Crd.model_validate({**OPTIONS, **wrong})


class _Killed(Exception):
    pass


def test_the_memory_is_part_of_a_snapshot(tmp_path):
    numbers = torch.arange(24).split(8)
    data = [
        (batch, {"labels": labels, "index": index})
        for (batch, labels), index in zip(train_data()["train"], numbers, strict=True)
    ]
    losses = [{"use": "hard_labels"}, {**OPTIONS, "weight": 0.1}]

    def run(folder, stop=None):
        def progress(text, done, total):
            if done == stop:
                raise _Killed

        context = Context(data={"train": data}, teacher=wider(), scratch=folder,
                          original=student(), on_progress=progress)  # fmt: skip
        options = {"steps": 6, "teacher": "given", "snapshot": 3, "losses": losses,
                   "shuffle": "samples", "optimizer": {"use": "Adam", "lr": 0.01}}  # fmt: skip
        program = tapped(student(), ("end", "second"))
        return apply(Fit, program, options, context).program.state()

    whole = run(tmp_path / "whole")
    with pytest.raises(_Killed):
        run(tmp_path / "killed", stop=4)
    (snapshot,) = (tmp_path / "killed").glob("step-*")
    assert "sides.0.memory" in (snapshot / "training.json").read_text()
    again = run(tmp_path / "killed")
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
