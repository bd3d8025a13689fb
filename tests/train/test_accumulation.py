"""Batches whose gradients are accumulated make one step of the joined batch."""

import pytest
import torch
from torch import nn

from fxcompress.train import FitConfig, Hooks, fit
from tests.train.trainings import batches, bits

STEP = {"steps": 3, "shuffle": "none", "optimizer": {"use": "SGD", "lr": 0.5}}


def linear():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def joined(data, count):
    """The same data in batches `count` times as large."""
    found = []
    for start in range(0, len(data), count):
        part = data[start : start + count]
        x = torch.cat([item[0][0] for item in part])
        found.append(((x,), torch.cat([item[1] for item in part])))
    return found


def close(a, b):
    return all(torch.allclose(a[name], b[name], rtol=1e-12, atol=1e-14) for name in a)


def doubles(count=6, ignored=False, sizes=None):
    data = [((x.double(),), y) for (x,), y in batches(count)]
    if sizes:
        data = [((x[:n],), y[:n]) for ((x,), y), n in zip(data, sizes, strict=True)]
    if ignored:
        # Each batch leaves out another number of its targets, the second all of them.
        for place, (_, target) in enumerate(data):
            target[: 8 if place == 1 else place] = -100
    return data


LOSSES = {
    "one": [{"use": "hard_labels", "smoothing": 0.1}],
    "several": [
        {"use": "hard_labels", "weight": {"from": 1, "to": 0.5}},
        {"use": "soft_labels", "temperature": 2.0, "weight": 0.3},
        {"use": "mse", "against": "teacher", "weight": 2.0},
    ],
}


@pytest.mark.parametrize("losses", sorted(LOSSES))
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", [None, (8, 8, 8, 3, 1, 5)])
def test_a_step_of_several_batches_is_one_of_the_joined_batch(losses, masked, sizes):
    data = doubles(ignored=masked, sizes=sizes)
    ours, theirs = linear(), linear()
    teacher = None if losses == "one" else linear().requires_grad_(False)
    if teacher is not None:
        with torch.no_grad():
            teacher[0].weight.add_(0.3)
    hooks = Hooks(penalty=lambda module, _: 0.01 * module[0].weight.abs().sum())
    told = {**STEP, "steps": 2, "losses": LOSSES[losses]}
    first = fit(ours, FitConfig.model_validate({**told, "accumulate": 3}), data,
                teacher=teacher, hooks=hooks)  # fmt: skip
    second = fit(theirs, FitConfig.model_validate(told), joined(data, 3), teacher=teacher,
                 hooks=hooks)  # fmt: skip
    assert close(bits(ours), bits(theirs))
    for name, value in second.history[0].losses.items():
        assert first.history[0].losses[name] == pytest.approx(value, rel=1e-9)
    assert first.history[0].loss == pytest.approx(second.history[0].loss, rel=1e-9)


def test_padding_weighs_nothing_wherever_it_is():
    """Sequences in batches padded to different lengths, and all in one batch."""

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(2)
                self.words, self.head = nn.Embedding(11, 5), nn.Linear(5, 11)
            self.double()

        def forward(self, input_ids, attention_mask):
            return self.head(self.words(input_ids))

    def padded(rows, length):
        ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length)
        for place, row in enumerate(rows):
            ids[place, : len(row)], mask[place, : len(row)] = torch.tensor(row), 1
        return {"input_ids": ids, "attention_mask": mask.long()}

    rows = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [10, 1], [2, 4, 6, 8]]
    told = {**STEP, "steps": 1, "losses": [{"use": "next_token"}, {"use": "soft_labels"}]}
    ours, theirs, teacher = Words(), Words(), Words()
    with torch.no_grad():
        teacher.head.weight.mul_(2)
    parts = [padded(rows[:2], 7), padded(rows[2:], 5)]
    fit(ours, FitConfig.model_validate({**told, "accumulate": 2}), parts, teacher=teacher)
    fit(theirs, FitConfig.model_validate(told), [padded(rows, 9)], teacher=teacher)
    assert close(bits(ours), bits(theirs))


def test_the_last_step_of_an_epoch_takes_what_is_left():
    done = fit(linear(), FitConfig(epochs=2, accumulate=4), doubles(6))
    assert [(epoch.step, epoch.samples) for epoch in done.history] == [(2, 48), (4, 48)]


def test_counting_first_leaves_dropout_and_batch_norms_alone():
    """What is counted without gradients draws nothing and moves no statistics."""
    seen = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop, self.head = nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)

        def forward(self, x):
            seen.append((self.training, torch.is_grad_enabled()))
            return self.head(self.drop(self.norm(x)))

    module = Watched()
    data = [((x.float(),), y) for (x,), y in doubles(ignored=True)]
    losses = [{"use": "hard_labels"}, {"use": "mse", "against": "teacher"}]
    teacher = nn.Linear(6, 3)
    fit(module, FitConfig.model_validate({"epochs": 1, "accumulate": 3, "losses": losses}), data,
        teacher=teacher)  # fmt: skip
    assert seen == [*[(False, False)] * 3, *[(True, True)] * 3] * 2
    assert module.norm.num_batches_tracked == 6
