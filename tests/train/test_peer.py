"""Two models that teach one another: whose gradients are whose, and resumption."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxcompress.errors import UsageError
from fxcompress.train import fit
from tests.train.trainings import Killed, batches, bits, config, killed_at, net, same

LOSSES = [{"use": "hard_labels"}, {"use": "soft_labels", "temperature": 1}]


def other(seed=1):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def train(model, peer, **options):
    told = {"losses": LOSSES, "optimizer": {"use": "SGD", "lr": 0.1}, **options}
    return fit(model, config(**told), batches(), peer=peer, seed=3)


def test_one_step_is_that_of_two_separate_losses():
    """Each model gets the gradient of its own losses against the other's outputs alone."""
    model, peer = net(dropout=0), other()
    expected = []
    ((x,), y), *_ = batches()
    pair = [net(dropout=0).train(), other().train()]
    outputs = [each(x) for each in pair]
    for place, each in enumerate(pair):
        z, v = outputs[place], outputs[1 - place].detach()
        kl = F.kl_div(z.log_softmax(1), v.log_softmax(1), log_target=True, reduction="batchmean")
        loss = F.cross_entropy(z, y) + kl
        gradients = torch.autograd.grad(loss, list(each.parameters()))
        expected.append([p - 0.1 * g for p, g in zip(each.parameters(), gradients, strict=True)])
    done = train(model, peer, steps=1, shuffle="none")
    for each, wanted in zip((model, peer), expected, strict=True):
        for found, value in zip(each.parameters(), wanted, strict=True):
            torch.testing.assert_close(found, value, atol=1e-6, rtol=1e-5)
    terms = done.history[0].losses
    assert set(terms) == {"hard_labels", "soft_labels", "peer.hard_labels", "peer.soft_labels"}


def test_both_learn_and_the_statistics_of_both_norms_move():
    model, peer = net(), other()
    before = bits(peer)
    done = train(model, peer, epochs=6)
    assert done.history[-1].losses["hard_labels"] < done.history[0].losses["hard_labels"]
    assert done.history[-1].losses["peer.hard_labels"] < done.history[0].losses["peer.hard_labels"]
    assert not torch.equal(before["1.running_mean"], bits(peer)["1.running_mean"])
    assert not peer[1].weight.grad
    assert all(p.requires_grad for p in peer.parameters())


def test_gradients_are_clipped_apart():
    """A peer with a large gradient takes nothing from the model's."""
    calm, wild = net(dropout=0), net(dropout=0)
    loud = other()
    with torch.no_grad():
        loud[3].weight.mul_(1e3)
    losses = [{"use": "hard_labels"}, {"use": "soft_labels", "weight": 0}]
    for model, peer in ((calm, other()), (wild, loud)):
        train(model, peer, losses=losses, steps=1, clip_norm=0.1)
    assert same(bits(calm), bits(wild))


@pytest.mark.parametrize(
    "options", [{"snapshot": 4}, {"accumulate": 2, "snapshot": 2}, {"keep": "best"}], ids=str
)
def test_a_killed_training_ends_in_the_same_bits(tmp_path, options):
    told = {
        "losses": [*LOSSES, {"use": "ctkd"}], "optimizer": {"use": "AdamW", "lr": 0.01}, **options
    }  # fmt: skip

    def run(folder=None, stop=None):
        model, peer = net(), other()
        report = None if stop is None else killed_at(stop)
        fit(model, config(**told), batches(), peer=peer, seed=3, snapshots=folder, progress=report)
        return bits(model), bits(peer)

    whole = run()
    with pytest.raises(Killed):
        run(tmp_path, stop=5 if "accumulate" in options else 10)
    torch.rand(5)
    resumed = run(tmp_path)
    assert all(same(a, b) for a, b in zip(whole, resumed, strict=True))


def test_accumulated_batches_are_one_batch():
    plain = [nn.Sequential(nn.Linear(6, 3)) for _ in range(2)]
    states = [each.state_dict() for each in plain]
    results = []
    for size, count in ((8, 1), (4, 2)):
        pair = [nn.Sequential(nn.Linear(6, 3)) for _ in range(2)]
        for each, state in zip(pair, states, strict=True):
            each.load_state_dict(state)
        told = {"losses": LOSSES, "steps": 2, "epochs": None, "accumulate": count,
                "shuffle": "none", "optimizer": {"use": "SGD", "lr": 0.1}}  # fmt: skip
        fit(pair[0], config(**told), _cut(size), peer=pair[1])
        results.append(pair)
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one[0].weight, two[0].weight)


def _cut(size):
    xs = torch.cat([x for (x,), _ in batches()])
    ys = torch.cat([y for _, y in batches()])
    return [((x,), y) for x, y in zip(xs.split(size), ys.split(size), strict=True)]


def test_a_model_cannot_be_its_own_peer():
    with pytest.raises(UsageError, match="is the model itself") as caught:
        train(net(), net(), steps=1)
    assert "seed" in str(caught.value)
