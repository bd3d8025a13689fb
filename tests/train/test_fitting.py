"""The training loop: what a step is, how long it goes on, and what it refuses."""

import math

import pytest
import torch
from torch import nn

from fxcompress.errors import DataError, NumericsError, UsageError
from fxcompress.train import FitConfig, Hooks, fit
from tests.train.trainings import batches, bits, config, net, same


def test_what_is_around_is_left_as_it_was():
    module, teacher = net().eval(), net().eval()
    module[0].weight.requires_grad_(False)
    teacher[1].train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    before, teachers = bits(module), bits(teacher)
    losses = [{"use": "soft_labels"}, {"use": "mse", "against": "teacher", "weight": 0.1}]
    fit(module, config(losses=losses), batches(), teacher=teacher)
    assert torch.equal(torch.rand(3), expected)
    assert [part.training for part in module.modules()] == [False] * 6
    assert teacher[1].training
    assert same(teachers, bits(teacher))
    assert all(p.grad is None for net_ in (module, teacher) for p in net_.parameters())
    assert not module[0].weight.requires_grad
    assert torch.equal(module[0].weight, before["0.weight"])
    assert not torch.equal(module[4].weight, before["4.weight"])


def test_the_loss_is_the_weighted_sum_of_its_terms():
    terms = [{"use": "hard_labels", "weight": 0.25}, {"use": "soft_labels", "weight": 0.75}]
    done = fit(net(), config(losses=terms), batches(), teacher=net().eval())
    for epoch in done.history:
        total = 0.25 * epoch.losses["hard_labels"] + 0.75 * epoch.losses["soft_labels"]
        assert math.isclose(epoch.loss, total, rel_tol=1e-6)


def test_one_step_is_one_step_of_torch():
    """The loop adds nothing: a bare loop gives the same bits."""
    data, ours, theirs = batches(), net(0.0), net(0.0).train()
    options = {"shuffle": "none", "optimizer": {"use": "SGD", "lr": 0.1, "momentum": 0.9}}
    fit(ours, config(**options), data)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        for (x,), y in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(theirs(x), y, reduction="sum").div(len(y)).backward()
            optimizer.step()
    assert same(bits(ours), bits(theirs))


def test_hooks_penalise_change_gradients_and_write_weights():
    mask = (torch.arange(48).reshape(3, 16) % 2).float()
    seen = []

    def penalty(module, moment):
        seen.append(moment)
        return 0.1 * module[4].weight.abs().sum() * moment.progress

    def on_gradients(module, moment):
        module[0].weight.grad.zero_()

    def after_step(module, moment):
        module[4].weight.mul_(mask)

    module = net()
    before = bits(module)
    hooks = Hooks(penalty, on_gradients, after_step)
    done = fit(module, config(optimizer={"use": "SGD", "lr": 0.1}), batches(), hooks=hooks)
    assert not module[4].weight[mask == 0].any()
    assert torch.equal(module[0].weight, before["0.weight"])
    assert done.history[0].losses["penalty"] > 0
    assert (seen[0].progress, seen[-1].progress) == (0.0, 1.0)
    assert [moment.step for moment in seen] == list(range(12))


def test_lengths_are_epochs_steps_or_both():
    def steps(**options):
        history = fit(net(), FitConfig.model_validate(options), batches()).history
        return [epoch.step for epoch in history]

    assert steps(epochs=2) == [6, 12]
    assert steps(steps=8) == [6, 8]
    assert steps(steps=8, epochs=1) == [6]
    assert steps(steps=4, epochs=3) == [4]


def test_patience_ends_a_training_and_the_best_epoch_is_kept():
    figures = iter([0.5, 0.9, 0.8, 0.7, 0.95])
    states = []

    def evaluate(module):
        states.append(bits(module))
        return next(figures)

    module = net()
    options = {"epochs": 5, "patience": 2, "keep": "best"}
    done = fit(module, config(**options), batches(), evaluate=evaluate)
    assert [epoch.metric for epoch in done.history] == [0.5, 0.9, 0.8, 0.7]
    assert done.stopped_early
    assert (done.best, done.kept) == (1, 1)
    assert same(bits(module), states[1])
    assert not same(states[1], states[3])


def test_a_metric_that_falls_when_it_improves_is_judged_so():
    figures = iter([3.0, 2.0, 2.5])
    done = fit(net(), config(epochs=3), batches(), evaluate=lambda _: next(figures),
               higher_is_better=False)  # fmt: skip
    assert done.best == 1


class Endless:
    """A stream without an end."""

    def __iter__(self):
        while True:
            yield from batches()


def test_a_stream_without_an_end_is_trained_on_by_steps():
    done = fit(net(), FitConfig(steps=20, shuffle="none"), Endless())
    assert [(epoch.epoch, epoch.step) for epoch in done.history] == [(1, 20)]


def test_epochs_differ_in_order_and_samples_are_all_seen():
    for shuffle in ("batches", "samples"):
        seen = []
        model = net()
        model.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].clone()))
        fit(model, config(shuffle=shuffle), batches())
        first, second = torch.cat(seen[:6]), torch.cat(seen[6:])
        assert not torch.equal(first, second)
        whole = torch.cat([x for (x,), _ in batches()])
        for each in (first, second):
            assert torch.equal(each.sort(0).values, whole.sort(0).values)


def test_a_small_last_batch_and_mappings_are_shuffled_by_samples():
    data = [({"input": x}, y) for (x,), y in batches()]
    data[-1] = ({"input": data[-1][0]["input"][:3]}, data[-1][1][:3])
    done = fit(net(), config(shuffle="samples"), data)
    assert done.history[0].samples == 43


def test_batches_that_are_not_alike_cannot_be_shuffled_by_samples():
    data = [((torch.zeros(2, n, 6),), torch.zeros(2, n, dtype=torch.long)) for n in (3, 4)]
    with pytest.raises(DataError, match="write `shuffle: batches`"):
        fit(net(), config(shuffle="samples"), data)


def test_a_batch_too_small_for_batch_norms_is_named():
    data = batches()
    data[3] = ((data[3][0][0][:1],), data[3][1][:1])
    with pytest.raises(DataError, match="batch 3 of epoch 1 is too small"):
        fit(net(), config(shuffle="none"), data)
    fit(net(), config(shuffle="none", batch_norm="frozen"), data)


def test_a_loss_that_is_no_number_stops_before_the_weights_are_spoilt(tmp_path):
    data = batches()
    data[4] = ((torch.full((8, 6), math.inf),), data[4][1])
    module = net()
    with pytest.raises(NumericsError, match="the loss is nan in step 5, epoch 1"):
        fit(module, config(shuffle="none", snapshot=3), data, snapshots=tmp_path)
    assert all(p.isfinite().all() for p in module.parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(UsageError, match=r"4\.bias cannot be trained"):
        fit(net(), config(), batches(), names=["4.bias"])
    with pytest.raises(UsageError, match="nothing to train"):
        fit(net().requires_grad_(False), config(), batches())
    with pytest.raises(UsageError, match="there is none"):
        fit(net(), config(losses=[{"use": "soft_labels"}]), batches())
    with pytest.raises(UsageError, match=r"Muon\(lr=0\.1\) is refused") as caught:
        fit(net(), config(optimizer={"use": "Muon", "lr": 0.1}), batches())
    assert "2D" in caught.value.reason
    scheduler = {"use": "StepLR", "step_size": 1, "warmup": 12}
    with pytest.raises(UsageError, match="leaves nothing for StepLR"):
        fit(net(), config(scheduler=scheduler), batches())
    with pytest.raises(DataError, match="empty"):
        fit(net(), config(), [])

    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(UsageError, match="does not depend on what is trained"):
        fit(Detached(), config(), batches(), names=["unused.weight"])
