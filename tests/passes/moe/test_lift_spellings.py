"""More spellings of mixtures: einsum, weights for every expert, weighed tokens, capacities."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxcompress.emit import emit
from fxcompress.ir import capture
from fxcompress.nn import Experts
from fxcompress.testing import check_pass
from passes.moe.change_top_k import ChangeTopK
from passes.moe.lift import Lift
from passes.moe.prune_experts import PruneExperts
from tests.passes.moe.mixtures import EXPERTS, HIDDEN, WIDTH, Mixture
from tests.passes.support import apply


class Stacks(Mixture):
    """Stacks of matrices `[experts, in, out]`."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(0.3 * torch.randn(EXPERTS, WIDTH, HIDDEN))
        self.up = nn.Parameter(0.3 * torch.randn(EXPERTS, WIDTH, HIDDEN))
        self.down = nn.Parameter(0.3 * torch.randn(EXPERTS, HIDDEN, WIDTH))
        self.bias = nn.Parameter(torch.randn(EXPERTS, HIDDEN))

    def spread(self, x, weights, indices):
        zeros = torch.zeros(*x.shape[:-1], EXPERTS, dtype=x.dtype)
        return zeros.scatter(-1, indices, weights)


class ExpertsFirst(Stacks):
    def mix(self, x, weights, indices):
        rows = x.reshape(-1, WIDTH)
        gate = torch.einsum("bd,edf->ebf", rows, self.gate)
        up = torch.einsum("bd,edf->ebf", rows, self.up) + self.bias.unsqueeze(1)
        made = torch.einsum("ebf,efd->ebd", F.silu(gate) * up, self.down)
        dense = self.spread(x, weights, indices).reshape(-1, EXPERTS)
        return torch.einsum("ebd,be->bd", made, dense).reshape(x.shape)


class ExpertsLater(Stacks):
    """Matrices the other way round, and a bias without a dimension of rows."""

    def __init__(self):
        super().__init__()
        self.down = nn.Parameter(0.3 * torch.randn(EXPERTS, WIDTH, HIDDEN))

    def mix(self, x, weights, indices):
        gate = torch.einsum("...d,edf->...ef", x, self.gate)
        up = torch.einsum("...d,edf->...ef", x, self.up) + self.bias
        made = torch.einsum("bsef,edf->bsed", F.silu(gate) * up, self.down)
        return torch.einsum("bsed,bse->bsd", made, self.spread(x, weights, indices))


class ThenBatched(Stacks):
    """One product as an einsum, the other as a batched product."""

    def mix(self, x, weights, indices):
        rows = x.reshape(-1, WIDTH)
        inner = torch.einsum("td,edf->etf", rows, self.up).relu()
        made = torch.bmm(inner, self.down)
        dense = self.spread(x, weights, indices).reshape(-1, EXPERTS)
        return (made * dense.t().unsqueeze(-1)).sum(0).reshape(x.shape)


class Renormalised(Stacks):
    """A weight for every expert, renormalised behind a mask: `[…, k]` are nowhere in the graph."""

    def forward(self, x):
        x = self.inp(x)
        shares = self.router(x).softmax(-1)
        chosen = shares.topk(self.k, -1).indices
        mask = torch.zeros_like(shares).scatter(-1, chosen, 1.0)
        dense = shares * mask
        dense = dense / dense.sum(-1, keepdim=True)
        inner = (x.unsqueeze(-3) @ self.gate).relu()
        made = inner @ self.down
        return self.out(x + (made * dense.movedim(-1, -2).unsqueeze(-1)).sum(-3))


class WeighedTokens(Stacks):
    """As in Llama 4: a sigmoid of the largest scores weighs the tokens that experts read."""

    def forward(self, x):
        x = self.inp(x)
        rows = x.reshape(-1, WIDTH)
        scores = self.router(rows)
        largest, chosen = scores.topk(self.k, 1)
        spread = torch.full_like(scores, float("-inf")).scatter_(1, chosen, largest).sigmoid()
        weighed = rows.repeat(EXPERTS, 1) * spread.transpose(0, 1).reshape(-1, 1)
        stacked = weighed.view(EXPERTS, -1, WIDTH)
        inner = F.silu(torch.bmm(stacked, self.gate)) * torch.bmm(stacked, self.up)
        return self.out(x + torch.bmm(inner, self.down).sum(0).reshape(x.shape))


class Capacity(Stacks):
    """As in GShard: a one-hot choice of two, cut at a capacity, and weights beside it."""

    def forward(self, x):
        x = self.inp(x)
        shares = self.router(x).softmax(-1)
        weights, chosen = shares.topk(self.k, -1)
        mask = F.one_hot(chosen, EXPERTS)
        mask = mask * (mask.sum(-2).cumsum(-2).unsqueeze(-2) <= 2)
        inner = torch.einsum("bsd,edf->bsef", x, self.up).relu()
        made = torch.einsum("bsef,efd->bsed", inner, self.down)
        return self.out(x + torch.einsum("bsed,bske,bsk->bsd", made, mask.to(x.dtype), weights))


class OrNone(Stacks):
    """As in Zaya: a router with a choice of none, which counts nothing."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS + 1, bias=False)

    def route(self, x):
        weights, chosen = super().route(x)
        none = chosen == EXPERTS
        return weights.masked_fill(none, 0), chosen.masked_fill(none, 0)

    def mix(self, x, weights, indices):
        inner = torch.einsum("bsd,edf->bsef", x, self.up).relu()
        made = torch.einsum("bsef,efd->bsed", inner, self.down)
        mask = F.one_hot(indices, EXPERTS).to(x.dtype)
        return torch.einsum("bsed,bske,bsk->bsd", made, mask, weights)


class LimitedGate(Stacks):
    """A gate and its partner cut off, as in DeepSeek V4."""

    def mix(self, x, weights, indices):
        rows = x.reshape(-1, WIDTH)
        gate = torch.einsum("td,edf->tef", rows, self.gate).clamp(max=0.25)
        up = torch.einsum("td,edf->tef", rows, self.up).clamp(-0.25, 0.25)
        made = torch.einsum("tef,efd->ted", F.silu(gate) * up, self.down)
        dense = self.spread(x, weights, indices).reshape(-1, EXPERTS)
        return torch.einsum("ted,te->td", made, dense).reshape(x.shape)


ALL = (
    ExpertsFirst, ExpertsLater, ThenBatched, Renormalised, WeighedTokens, Capacity, LimitedGate,
    OrNone,
)  # fmt: skip


def results(module, x):
    """Return outputs, and gradients by the input and what is not of experts."""
    x = x.clone().requires_grad_()
    y = module(x)
    parameters = sorted(module.named_parameters())
    own = [p for n, p in parameters if n.startswith(("inp", "out", "router"))]
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
    return [y.detach(), *torch.autograd.grad(loss, [x, *own])]


def error(left, right):
    """Return ‖a − b‖ / ‖b‖."""
    return float((left - right).detach().norm() / right.detach().norm())


FAST = (ExpertsLater, WeighedTokens, Capacity)


@pytest.mark.parametrize(
    "cls", [c if c in FAST else pytest.param(c, marks=pytest.mark.slow) for c in ALL]
)
def test_a_spelling_becomes_the_leaf_and_is_equal_in_double(cls):
    torch.manual_seed(0)
    model = cls().double()
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    program = capture(model, (x,), dynamic={"x": {0: "batch", 1: "seq"}}, verify=False)
    result = check_pass(Lift, program)
    (mixture,) = result.decision.lifted
    assert not result.decision.declined
    assert (mixture.experts, mixture.width, mixture.hidden) == (EXPERTS, WIDTH, HIDDEN)
    assert any(isinstance(each, Experts) for each in result.program.module.modules())
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    for got, wanted in zip(results(result.program.module, x), results(model, x), strict=True):
        assert error(got, wanted) <= 1e-12


def without_first(module, args, scores):
    return scores.index_fill(-1, torch.tensor([0]), float("-inf"))


@pytest.mark.parametrize("cls", [WeighedTokens, pytest.param(Capacity, marks=pytest.mark.slow)])
def test_what_is_lifted_is_pruned_and_given_another_top_k(cls):
    torch.manual_seed(0)
    model = cls().double()
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    program = capture(model, (x,), dynamic={"x": {0: "batch", 1: "seq"}}, verify=False)
    pruned = apply(PruneExperts, program, {"experts": [[0]]}).program.module
    with model.router.register_forward_hook(without_first):
        wanted = model(x)
    assert error(pruned(x), wanted) <= 1e-12
    model.k = 3
    more = apply(ChangeTopK, program, {"top_k": 3}).program.module
    assert error(more(x), model(x)) <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("cls", [WeighedTokens, Capacity])
def test_what_is_lifted_is_written(cls, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(3, 5, WIDTH)
    program = capture(cls(), (x,), dynamic={"x": {0: "batch", 1: "seq"}}, verify=False)
    # Emitting reloads each file, at other sizes, and compares.
    emit(check_pass(Lift, program).program, tmp_path, ["pt2", "python", "onnx"])
    assert (tmp_path / "model.onnx").exists()
