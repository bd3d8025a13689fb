"""`quantize.ternary`: scales and levels, training, sizes, and refusals."""

import pytest
import torch
from torch import nn

from fxcompress.analysis import cost
from fxcompress.errors import NumericsError, UsageError
from fxcompress.ir import Program
from fxcompress.pipeline.context import Context
from fxcompress.testing import check_pass
from passes.quantize.ternary import Ternary
from passes.train.fit import Fit
from tests.passes.support import apply, captured, random_input

METHODS = ["twn", "absmean"]


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu())


def alpha_of(rows, method):
    size = rows.abs()
    mean = size.mean(1, keepdim=True)
    if method == "absmean":
        return mean
    kept = torch.where(size > 0.7 * mean, size, torch.nan)
    return kept.nanmean(1, keepdim=True)


def fresh():
    """A program of its own, whose weights a test may change."""
    return captured(lambda: Three(), 2, 6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("per", ["channel", "tensor"])
def test_every_weight_becomes_the_nearest_of_three(method, per):
    program = captured(Three, 2, 6)
    options = {"method": method, "per": per, "train": False}
    result = check_pass(Ternary, program, options, idempotent=False)
    weight = program.state()["b.weight"].detach()
    rows = weight if per == "channel" else weight.reshape(1, -1)
    alpha = alpha_of(rows, method)
    levels = alpha * torch.tensor([-1.0, 0.0, 1.0])
    nearest = levels.gather(1, (rows[..., None] - levels[:, None]).abs().argmin(-1))
    made = result.program.state()["b.weight"]
    torch.testing.assert_close(made, nearest.reshape(made.shape))
    assert torch.equal(result.program.module.get_submodule("b_weight_fq")(made), made)
    assert torch.equal(result.program.state()["a.weight"], program.state()["a.weight"])


def test_the_threshold_of_twn_gives_nearly_the_least_error():
    program = fresh()
    row = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        program.module.b.weight.copy_(row[:, : 12 * 16].reshape(12, 16))
    result = apply(Ternary, program, {"per": "tensor", "train": False})
    error = (result.program.state()["b.weight"] - program.module.b.weight).square().sum()
    weight = program.module.b.weight.detach()
    best = min(
        float((weight - s * (weight / s).round().clamp(-1, 1)).square().sum())
        for s in torch.linspace(0.5, 2, 301)
    )
    assert error <= 1.02 * best


@pytest.mark.parametrize("method", METHODS)
def test_it_trains_and_scales_follow(method):
    program = captured(Three, 2, 6)
    x = random_input(64, 6)
    data = {"train": [((x,), x[:, :3].argmax(1))]}
    ternary = apply(Ternary, program, {"method": method}).program
    options = {"epochs": 40, "optimizer": {"use": "Adam", "lr": 0.02}}
    trained = apply(Fit, ternary, options, Context(data=data))
    losses = [epoch.loss for epoch in trained.decision.history]
    assert losses[-1] < 0.5 * losses[0]
    fake = trained.program.module.get_submodule("b_weight_fq")
    assert not torch.equal(fake.scale, ternary.module.get_submodule("b_weight_fq").scale)
    assert fake(trained.program.state()["b.weight"]).div(fake.scale[:, None]).unique().tolist() == [
        -1, 0, 1,
    ]  # fmt: skip


def test_a_file_holds_two_bits_each(tmp_path):
    result = apply(Ternary, captured(Three, 2, 6), {"train": False})
    saved = cost(result.before).bytes - cost(result.program).bytes
    assert saved == 12 * 16 * 30 // 8 - 12 * (4 + 1)
    file = result.program.save(tmp_path / "model.fxp")
    back = Program.load(file)
    assert back.fingerprint() == result.program.fingerprint()


def test_zeros_stay_zeros_and_are_named():
    program = fresh()
    with torch.no_grad():
        program.module.b.weight.zero_()
    for method in METHODS:
        result = apply(Ternary, program, {"method": method, "train": False})
        assert "b.weight: 12 of 12 scales" in result.decision.summary()[1]
        assert not result.program.state()["b.weight"].any()
        assert result.program(random_input(2, 6)).isfinite().all()


def test_a_constant_channel_is_kept_whole():
    program = fresh()
    with torch.no_grad():
        program.module.b.weight[0] = -0.3
    result = apply(Ternary, program, {"train": False})
    torch.testing.assert_close(result.program.state()["b.weight"][0], torch.full((16,), -0.3))


def test_nan_and_nothing_to_do_are_refused():
    program = fresh()
    with pytest.raises(UsageError, match="no layer to quantise"):
        apply(Ternary, program, {"targets": ["a"]})
    with torch.no_grad():
        program.module.b.weight[0, 0] = float("inf")
    with pytest.raises(NumericsError, match=r"b\.weight"):
        apply(Ternary, program)


def test_shared_weights_are_quantised_together_or_not_at_all():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.c, self.d = nn.Linear(6, 6), nn.Linear(6, 2)
            self.c.weight = self.b.weight

        def forward(self, x):
            return self.d(self.c(self.b(self.a(x)).relu()))

    program = captured(Shared, 2, 6)
    both = apply(Ternary, program, {"train": False})
    (entry,) = both.decision.weights
    assert entry.layers == ("b", "c")
    with pytest.raises(UsageError) as error:
        apply(Ternary, program, {"targets": ["b"]})
    assert "also read by c in float" in str(error.value)
