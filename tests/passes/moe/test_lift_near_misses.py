"""What plainly holds experts and is not lifted says which condition failed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxcompress.api import compress
from fxcompress.errors import PassError
from fxcompress.ir import capture
from passes.moe._lift.find import find_mixtures
from tests.passes.moe.mixtures import EXPERTS, HIDDEN, WIDTH, Feed, MaskedLoop, Mixture


def reasons(model):
    program = capture(model, (torch.randn(2, 5, WIDTH),), dynamic="batch", verify=False)
    search = find_mixtures(program)
    assert not search.found
    return [each.reason for each in search.refused]


def masked(expert):
    torch.manual_seed(0)
    model = MaskedLoop()
    model.experts = nn.ModuleList(expert(e) for e in range(EXPERTS))
    return model


def layers(*inner):
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), *inner, nn.Linear(HIDDEN, WIDTH))


@pytest.mark.parametrize(
    ("expert", "told"),
    [
        (
            lambda e: layers(nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU()),
            "4 branches read the same tokens and are weighed by a choice, as experts are, but each "
            "is not two or three linear layers with an activation between: "
            "linear → relu → linear → relu → linear",
        ),
        (
            lambda e: layers(nn.LayerNorm(HIDDEN), nn.ReLU()),
            "with an activation between: linear → layer_norm → relu → linear",
        ),
        (lambda e: nn.Linear(WIDTH, WIDTH), "with an activation between: linear"),
        (
            lambda e: layers((nn.ReLU(), nn.SiLU(), nn.GELU(), nn.Tanh())[e]),
            "their activations or dropouts differ",
        ),
        (lambda e: layers(nn.Softplus()), "no activation that is known"),
        (
            lambda e: layers(nn.Dropout(0.1), nn.ReLU()),
            "it drops values before its activation is done",
        ),
        (
            lambda e: nn.Sequential(layers(nn.ReLU()), nn.Dropout(0.1)),
            "it drops values while training elsewhere than between activation and last matrix",
        ),
    ],
    ids=["deep", "norm", "one", "activations", "unknown", "early", "late"],
)
def test_branches_that_a_choice_weighs(expert, told):
    (reason,) = reasons(masked(expert))
    assert told in reason


class Soft(Mixture):
    """Every token goes through all experts."""

    def __init__(self):
        super().__init__(nn.ModuleList(Feed() for _ in range(EXPERTS)))

    def forward(self, x):
        shares = self.router(x).softmax(-1)
        made = [expert(x) * shares[..., e, None] for e, expert in enumerate(self.experts)]
        return torch.stack(made).sum(0)


def test_a_mixture_without_a_choice():
    (reason,) = reasons(Soft())
    assert reason == (
        "4 feed-forward layers that read the same tokens are weighed and summed, but nothing "
        "chooses among them (no top-k and no largest): every token goes through all"
    )


class NoneOfThem(MaskedLoop):
    """The router may choose a number that no expert has."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS + 1)


def test_a_router_that_chooses_among_more_than_there_are():
    (reason,) = reasons(NoneOfThem())
    assert reason == "its router chooses among 5, and there are 4 experts"


class NormBetween(Mixture):
    """Stacks of matrices with a norm between them."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(0.3 * torch.randn(EXPERTS, WIDTH, HIDDEN))
        self.down = nn.Parameter(0.3 * torch.randn(EXPERTS, HIDDEN, WIDTH))

    def mix(self, x, weights, indices):
        dense = torch.zeros(*x.shape[:-1], EXPERTS).scatter(-1, indices, weights)
        inner = F.relu(F.layer_norm(x.unsqueeze(-3) @ self.up, (HIDDEN,)))
        return ((inner @ self.down) * dense.movedim(-1, -2).unsqueeze(-1)).sum(-3)


def test_stacks_that_make_no_feed_forward_layer():
    first, second = reasons(NormBetween())
    assert first == second
    assert first.startswith("a stack of 4 matrices multiplies tokens, but is part of no")


def test_a_pass_that_changes_nothing_says_so():
    program = capture(Soft(), (torch.randn(2, 5, WIDTH),), dynamic="batch", verify=False)
    with pytest.raises(PassError, match="nothing chooses among them"):
        compress(program, [{"use": "moe.lift"}])


class Attention(nn.Module):
    """Projections of one shape, a gate and a largest value: no experts."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        q, k, v, gate = (part(x) for part in self.parts)
        made = F.scaled_dot_product_attention(q, k, v) * gate.sigmoid()
        return made + x, made.argmax(-1)


def test_projections_of_attention_are_no_experts():
    assert reasons(Attention()) == []
