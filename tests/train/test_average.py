"""The moving average of the weights, other precisions, and gradients cut to size."""

import math

import pytest
import torch
from torch import nn

from fxcompress.errors import NumericsError, UsageError
from fxcompress.train import FitConfig, Hooks, fit
from fxcompress.train._precision import Precision
from tests.train.trainings import batches, bits, config, net, same


def steps_of(module, **options):
    """Train and return the weights after each step."""
    seen = []
    hooks = Hooks(after_step=lambda module, _: seen.append(bits(module)))
    done = fit(module, config(**options), batches(), hooks=hooks)
    return done, seen


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_is_what_its_formula_says(warmup):
    module = net()
    _, seen = steps_of(module, ema={"decay": 0.7, "warmup": warmup})
    expected = seen[0]
    for t, weights in enumerate(seen[1:], 1):
        decay = min(0.7, t / (t + 9)) if warmup else 0.7
        expected = {
            name: decay * expected[name] + (1 - decay) * new if new.is_floating_point() else new
            for name, new in weights.items()
        }
    found = bits(module)
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in found)
    assert int(module[1].num_batches_tracked) == 12


def test_the_average_is_measured_and_does_not_change_the_course():
    measured = []
    options = {"ema": {"decay": 0.9}, "keep": "best"}

    def evaluate(module):
        measured.append(bits(module))
        return float(len(measured))

    module = net()
    fit(module, config(**options), batches(), evaluate=evaluate)
    _, seen = steps_of(net(), **options)
    _, plain = steps_of(net())
    assert all(same(a, b) for a, b in zip(seen, plain, strict=True))
    assert same(bits(module), measured[-1])
    assert not same(measured[-1], plain[-1])


def test_weights_that_are_masked_from_the_first_step_stay_masked_in_the_average():
    mask = (torch.arange(48).reshape(3, 16) % 2).float()
    module = net()
    hooks = Hooks(after_step=lambda module, _: module[4].weight.mul_(mask))
    fit(module, config(ema={"decay": 0.99}), batches(), hooks=hooks)
    assert not module[4].weight[mask == 0].any()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_computes_in_half_and_keeps_weights_whole(precision):
    seen = set()
    module = net(0.0)
    module[4].register_forward_hook(lambda _, args, out: seen.add(out.dtype))
    options = {"precision": precision, "epochs": 4, "optimizer": {"use": "SGD", "lr": 0.1}}
    done = fit(module, config(**options), batches())
    whole = net(0.0)
    expected = fit(whole, config(**{**options, "precision": "float32"}), batches())
    assert seen == {{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    assert all(p.dtype == torch.float32 for p in module.parameters())
    for ours, theirs in zip(done.history, expected.history, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=0.05)


def test_a_step_whose_fp16_gradients_overflow_is_left_out_and_the_scale_falls(monkeypatch):
    """The scale begins at 2^16: a loss of 10^6 overflows until it is small enough."""
    scales = []
    step = Precision.step

    def watched(self, optimizer):
        made = step(self, optimizer)
        scales.append((made, self.scaler.get_scale()))
        return made

    monkeypatch.setattr(Precision, "step", watched)
    module = net(0.0)
    before = bits(module)
    losses = [{"use": "hard_labels", "weight": 3e4}]
    options = {"precision": "fp16", "losses": losses, "clip_norm": 1.0, "epochs": 3,
               "scheduler": {"use": "StepLR", "step_size": 2}}  # fmt: skip
    fit(module, config(**options), batches())
    skipped = [scale for made, scale in scales if not made]
    assert skipped
    assert skipped == [2.0 ** (15 - place) for place in range(len(skipped))]
    assert scales[-1][0]
    assert not torch.equal(module[4].weight, before["4.weight"])
    assert all(p.isfinite().all() for p in module.parameters())


def test_gradients_that_overflow_at_every_scale_end_the_training():
    module = nn.Linear(6, 3)

    def infinite(module, moment):
        # A finite loss with an infinite gradient: the root's at zero.
        return (module.weight - module.weight.detach()).square().sum().sqrt()

    with pytest.raises(NumericsError, match="infinite or NaN at every loss scale"):
        fit(module, FitConfig(epochs=20, precision="fp16"), batches(),
            hooks=Hooks(penalty=infinite))  # fmt: skip


def test_a_device_that_cannot_is_named():
    with pytest.raises(UsageError, match="xpu cannot train in fp16"):
        Precision("fp16", torch.device("xpu"))


@pytest.mark.parametrize("options", [{"accumulate": 3}, {"precision": "bf16"},
                                     {"precision": "fp16"}, {"ema": {}}])  # fmt: skip
def test_a_loss_that_is_no_number_stops_here_too(tmp_path, options):
    data = batches(9)
    data[7] = ((torch.full((8, 6), math.inf),), data[7][1])
    module = net()
    step = 3 if "accumulate" in options else 8
    with pytest.raises(NumericsError, match=f"the loss is nan in step {step}, epoch 1") as caught:
        fit(module, config(shuffle="none", snapshot=2, **options), data, snapshots=tmp_path)
    kept = 2 if step == 3 else 6
    assert f"step-{kept:08d}" in caught.value.reason
    assert all(p.isfinite().all() for p in module.parameters())


def test_gradients_are_cut_by_value_and_by_norm():
    seen = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]]))
            return super().step(closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "SGD", Watched)
        for limit in ({"clip_value": 0.01}, {"clip_norm": 0.05}, {}):
            seen.clear()
            fit(net(0.0), config(optimizer={"use": "SGD", "lr": 0.1}, **limit), batches())
            largest = max(float(each.abs().max()) for each in seen)
            longest = max(float(each.norm()) for each in seen)
            if "clip_value" in limit:
                assert largest == pytest.approx(0.01)
            elif "clip_norm" in limit:
                assert longest == pytest.approx(0.05, rel=1e-4)
            else:
                assert largest > 0.01
                assert longest > 0.05


def test_patience_waits_for_more_than_the_least_difference():
    figures = [0.5, 0.505, 0.51, 0.515, 0.6]

    def run(least):
        left = iter(figures)
        options = {"epochs": 5, "patience": 2, "min_delta": least, "keep": "best"}
        return fit(net(), config(**options), batches(), evaluate=lambda _: next(left))

    assert not run(0.0).stopped_early
    done = run(0.1)
    assert done.stopped_early
    assert [epoch.metric for epoch in done.history] == figures[:3]
    assert done.best == done.kept == 2
