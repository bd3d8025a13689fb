"""Training experts: the losses on routers, and a warning where a router collapses."""

import pytest
import torch

from fxcompress.api import compress
from fxcompress.pipeline.context import Context
from passes.train.fit import Fit
from tests.passes.moe.leaves import WIDTH, mixture, program_of
from tests.passes.moe.test_upcycle import gated
from tests.passes.support import apply


def labelled(width, count=4, seed=0):
    """Return batches of random tokens; the target is what a fixed matrix makes of them."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(width, 5, generator=generator)
    batches = []
    for _ in range(count):
        x = torch.randn(16, 4, width, generator=generator)
        batches.append(((x,), (x @ matrix).argmax(-1)))
    return batches


def trained(model, **options):
    told = {"epochs": 1, "losses": [{"use": "hard_labels", "classes": "last"}], **options}
    context = Context(data={"train": labelled(WIDTH)})
    return apply(Fit, program_of(model), told, context).decision


def collapsed():
    """Return a model whose routers send all tokens to their expert 2."""
    model = mixture(k=1)
    for block in model.blocks:
        block.norm.weight.data.fill_(0.01)
        block.norm.bias.data.fill_(1.0)
        block.router.weight.data.fill_(-1.0)
        block.router.weight.data[2] = 1.0
    return model


def test_a_router_that_collapses_is_named_with_its_load():
    decision = trained(collapsed(), optimizer={"use": "SGD", "lr": 1e-6})
    assert [each.shares for each in decision.routers] == [(0, 0, 1, 0, 0, 0)] * 2
    assert decision.summary() == tuple(
        f"the router of blocks.{i}.experts has collapsed: its 6 experts are used like 1.0, and "
        "expert 2 has 100% of the choices; add the loss `load_balance`, or raise its weight"
        for i in range(2)
    )
    (figure,) = decision.figures()
    assert figure.title == "Load of experts"
    assert figure.values[0] == (0, 0, 1, 0, 0, 0)


def test_an_even_load_is_no_warning():
    decision = trained(mixture(), optimizer={"use": "SGD", "lr": 1e-6})
    assert decision.summary() == ()
    assert all(3 < each.used <= 6 for each in decision.routers)
    assert all(sum(each.shares) == pytest.approx(1) for each in decision.routers)


def test_losses_on_routers_train_an_upcycled_model_in_the_pipeline():
    """The taps of moe.upcycle are found, need no teacher, and even out the load."""

    def run(weight):
        losses = [{"use": "mse"}, {"use": "router_z", "weight": 1e-3}]
        losses += [{"use": "load_balance", "weight": weight}] if weight else []
        steps = [
            {"use": "moe.upcycle", "experts": 4, "top_k": 1, "layers": [0], "router_std": 1.0},
            {"use": "train.fit", "epochs": 15, "losses": losses,
             "targets": ["router.*"], "optimizer": {"use": "Adam", "lr": 0.02}},
        ]  # fmt: skip
        data = {"train": [((x,), x * 0) for (x,), _ in labelled(16)]}
        found = compress(gated(), steps, data=data)
        return found.record.passes[1].decision, found

    (with_it, result), (without, _) = run(1.0), run(0.0)
    assert list(with_it["history"][0]["losses"]) == ["mse", "router_z", "load_balance"]
    spread = [max(each["routers"][0]["shares"]) for each in (with_it, without)]
    assert spread[0] < 0.33 < spread[1]
    balance = [epoch["losses"]["load_balance"] for epoch in with_it["history"]]
    assert balance[-1] < balance[0]
    assert balance[-1] == pytest.approx(1, abs=0.1)
    assert [tap["name"] for tap in with_it["taps"]] == ["router_0"]
    assert result.program.module.get_submodule("experts").up.shape[0] == 4
