"""Parameters with options of their own: learning rates by layer, and freezing."""

import pytest
import torch
from torch import nn

from fxcompress.errors import SelectorError, UsageError
from fxcompress.train import FitConfig, fit
from tests.train.trainings import batches, bits, same


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def trained(groups, **options):
    module = net()
    told = {"epochs": 1, "shuffle": "none", "optimizer": {"use": "SGD", "lr": 0.1}, **options}
    fit(module, FitConfig.model_validate({**told, "groups": groups}), batches())
    return module


def by_hand(*groups):
    module = net()
    optimizer = torch.optim.SGD(
        [{"params": [dict(module.named_parameters())[n] for n in names], **options}
         for names, options in groups], lr=0.1)  # fmt: skip
    for (x,), y in batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), y, reduction="sum").div(len(y)).backward()
        optimizer.step()
    return module


def test_the_first_group_that_fits_has_a_parameter():
    groups = [
        {"targets": ["*.bias"], "weight_decay": 0.0, "lr": 0.01},
        {"targets": ["0.*", "2.bias"], "scale": 0.5, "momentum": 0.9},
    ]
    ours = trained(groups)
    theirs = by_hand(
        (["2.weight"], {}), (["0.bias", "2.bias"], {"lr": 0.01}),
        (["0.weight"], {"lr": 0.05, "momentum": 0.9}),
    )  # fmt: skip
    assert same(bits(ours), bits(theirs))
    assert not same(bits(ours), bits(trained([])))


def test_what_is_frozen_keeps_its_bits():
    ours, before = trained([{"targets": ["0.*"], "freeze": True}]), bits(net())
    assert torch.equal(ours[0].weight, before["0.weight"])
    assert not torch.equal(ours[2].weight, before["2.weight"])
    assert all(parameter.requires_grad for parameter in ours.parameters())


def test_a_group_before_a_frozen_one_is_trained():
    groups = [{"targets": ["0.bias"], "lr": 0.2}, {"targets": ["0.*"], "freeze": True}]
    ours, before = trained(groups), bits(net())
    assert torch.equal(ours[0].weight, before["0.weight"])
    assert not torch.equal(ours[0].bias, before["0.bias"])


@pytest.mark.parametrize("scheduler", [
    {"use": "OneCycleLR", "max_lr": 0.1}, {"use": "CosineAnnealingLR", "warmup": 2},
    {"use": "CyclicLR", "base_lr": 0.01, "max_lr": 0.1},
])  # fmt: skip
def test_schedules_keep_the_ratio_of_the_groups(scheduler):
    """Halving the rate of a layer whose gradient is linear in it halves how far it goes."""

    def moved(scale):
        groups = [{"targets": ["2.bias"], "scale": scale}]
        optimizer = {"use": "SGD", "lr": 0.1, "momentum": 0.9}
        losses = [{"use": "custom", "factory": "f:sum"}]
        options = {"optimizer": optimizer, "steps": 4, "scheduler": scheduler, "losses": losses}
        module = net()
        told = FitConfig.model_validate({**options, "groups": groups})
        fit(module, told, batches(), functions={"f:sum": lambda outcome: outcome.output.mean()})
        return module[2].bias - net()[2].bias

    assert torch.allclose(moved(0.5), moved(1.0) / 2, rtol=1e-4)


def test_groups_that_cannot_be_are_refused():
    with pytest.raises(SelectorError, match=r"`1\.weight` in `groups` matches nothing") as caught:
        trained([{"targets": ["1.weight"], "lr": 0.1}])
    assert "2.weight" in caught.value.hint
    with pytest.raises(SelectorError, match="group 2 of `groups` is left with nothing"):
        trained([{"targets": ["*"], "lr": 0.1}, {"targets": ["0.*"], "lr": 0.2}])
    with pytest.raises(SelectorError, match="freezes every parameter"):
        trained([{"targets": ["*"], "freeze": True}])
    with pytest.raises(UsageError, match="SGD has no option `weigth_decay`") as caught:
        trained([{"targets": ["*.bias"], "weigth_decay": 0.0}])
    assert "weight_decay" in caught.value.hint
    with pytest.raises(ValueError, match="not both"):
        trained([{"targets": ["*"], "lr": 0.1, "scale": 2.0}])
    with pytest.raises(ValueError, match="takes no other options"):
        trained([{"targets": ["*"], "freeze": True, "lr": 0.1}])
