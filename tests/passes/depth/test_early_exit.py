"""Early exits: equal to the model cut off there, gradients, the loss, and refusals."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxcompress.emit._plain import plain_program
from fxcompress.errors import UsageError
from fxcompress.ir import capture
from fxcompress.rewrite import at_exit, early_exits
from fxcompress.testing import hash_weights_
from fxcompress.train.joint import join
from fxcompress.train.loss_config import Exits
from fxcompress.train.losses import make_terms
from passes.depth.early_exit import EarlyExit
from tests.passes.models import ResNet, Transformer, token_batches
from tests.passes.support import apply, captured, random_input, seeded

SIZES = {"ids": {0: "batch", 1: "seq"}}


def transformer(first=True, depth=4):
    return seeded(lambda: Transformer(width=8, depth=depth, heads=2, first=first))


@cache
def program_of(first=True, depth=4):
    model = transformer(first, depth)
    return capture(model, token_batches(1)[0], dynamic=SIZES, verify=False)


@pytest.mark.parametrize(
    ("first", "head"),
    [
        (True, "copy"),
        pytest.param(True, "shared", marks=pytest.mark.slow),
        pytest.param(False, "copy", marks=pytest.mark.slow),
        (False, "shared"),
    ],
)
def test_an_exit_is_the_model_that_ends_there(first, head):
    result = apply(EarlyExit, program_of(first), {"after": [0, 2], "head": head})
    ids = token_batches(1, batch=3, seq=7, seed=4)[0][0]
    assert torch.equal(result.program(ids), program_of(first)(ids))
    for place, name in ((0, "exit_0"), (2, "exit_1")):
        cut = transformer(first)
        cut.layers = cut.layers[: place + 1]
        ours = at_exit(result.program, name)
        assert torch.equal(ours(ids), cut(ids))
        ours.module.zero_grad()
        ours(ids).square().sum().backward()
        cut(ids).square().sum().backward()
        mine = dict(ours.module.named_parameters())["layers.0.qkv.weight"].grad
        assert torch.allclose(mine, cut.layers[0].qkv.weight.grad, rtol=1e-5, atol=1e-7)
        # What is emitted there has nothing of the blocks after it.
        assert not any(key.startswith(f"layers.{place + 1}") for key in ours.state())
    assert torch.equal(at_exit(result.program, "last")(ids), program_of(first)(ids))


def test_copies_are_their_own_and_shared_heads_are_not():
    copied = apply(EarlyExit, program_of(), {"count": 1}).program.state()
    added = {name for name in copied if name not in program_of().state()}
    assert added == {f"exits.exit_0.{n}.{w}" for n in ("norm", "head") for w in ("weight", "bias")}
    shared = apply(EarlyExit, program_of(), {"count": 1, "head": "shared"}).program.state()
    assert set(shared) == set(program_of().state())


def test_a_linear_head_reads_states_of_any_type():
    program = captured(ResNet, 2, 3, 16, 16)
    result = apply(EarlyExit, program, {"after": [0, 1], "head": "linear"})
    x = random_input(3, 3, 16, 16)
    assert torch.equal(result.program(x), program(x))
    assert torch.equal(at_exit(result.program, "exit_1")(x), torch.zeros(3, 10))
    assert result.decision.exits[0].share < result.decision.exits[1].share < 1


def test_what_is_emitted_has_no_exits_before_thresholds():
    result = apply(EarlyExit, program_of(), {"count": 2})
    module = plain_program(result.program).module
    assert not any("exits" in str(node.target) for node in module.graph.nodes)


def test_the_loss_adds_up_exits_and_what_the_last_one_teaches():
    program = apply(EarlyExit, program_of(), {"after": [0, 1]}).program
    ids, labels = token_batches(1)[0][0], torch.tensor([1, 2, 3, 0])[:4]
    options = Exits(use="exits", weights=(1.0, 3.0), distill=0.25, temperature=2.0)
    joint = join(program, None, make_terms((options,)))
    (term,) = joint.terms
    total, count = joint((ids,), labels, 0.0).totals["exits"]
    first, second, last = (at_exit(program, n)(ids) for n in ("exit_0", "exit_1", "last"))

    def one(z):
        kl = F.kl_div(F.log_softmax(z / 2, -1), F.log_softmax(last.detach() / 2, -1),
                      log_target=True, reduction="batchmean")  # fmt: skip
        return 0.75 * F.cross_entropy(z, labels) + 0.25 * 4 * kl

    wanted = (one(first) + 3 * one(second)) / 4
    torch.testing.assert_close(total / count, wanted)
    grads = torch.autograd.grad(total / count, [p for p in joint.module.parameters()],
                                allow_unused=True)  # fmt: skip
    names = [name for name, _ in joint.module.named_parameters()]
    known = {name for name, grad in zip(names, grads, strict=True) if grad is not None}
    assert "exits.exit_0.head.weight" in known
    # The last exit teaches and learns nothing from it.
    assert not known & {"head.weight", "layers.3.qkv.weight"}
    assert term.options.reads == {"taps", "output", "target"}


@pytest.mark.parametrize(
    ("options", "what", "reason"),
    [
        ({"after": [4]}, "there is no block 4", "the model has 4 blocks, layers.0 being block 0"),
        ({"after": [3]}, "an exit after block 3 is none",
         "it is the last block, and the model's own head follows it"),
        ({"count": 4}, "4 exits do not fit between 4 blocks",
         "the last block is followed by the model's own head"),
    ],
)  # fmt: skip
def test_places_that_cannot_be(options, what, reason):
    with pytest.raises(UsageError) as caught:
        apply(EarlyExit, program_of(), options)
    assert (caught.value.what, caught.value.reason) == (what, reason)


def test_types_that_differ_are_named():
    program = captured(ResNet, 2, 3, 16, 16)
    with pytest.raises(UsageError) as caught:
        apply(EarlyExit, program, {"after": [1]})
    assert caught.value.reason == "it is f32[batch,8,8,8], and the head reads f32[batch,16,4,4]"
    assert caught.value.hint == "use `head: linear`"
    with pytest.raises(UsageError, match="block 2 cannot have an exit") as caught:
        apply(EarlyExit, program, {"after": [2], "head": "linear"})
    assert "differs from its input" in caught.value.reason


class AllStates(nn.Module):
    """Answers by the sum of all states."""

    def __init__(self):
        super().__init__()
        self.inner = transformer()

    def forward(self, ids):
        x = self.inner.embed(ids)
        states = []
        for layer in self.inner.layers:
            x = layer(x)
            states.append(x)
        return self.inner.head(self.inner.norm(sum(states)).mean(1))


def test_a_head_that_reads_other_states_is_refused():
    program = capture(AllStates().eval(), token_batches(1)[0], dynamic=SIZES, verify=False)
    with pytest.raises(UsageError, match="the model's own head reads more") as caught:
        apply(EarlyExit, program, {"after": [0]})
    assert "which is computed after this block" in caught.value.reason
    assert apply(EarlyExit, program, {"after": [0], "head": "linear"}).decision.exits


def test_exits_are_added_once_and_an_unknown_one_is_named():
    program = apply(EarlyExit, program_of(), {"count": 1}).program
    with pytest.raises(UsageError, match="the model has early exits already"):
        apply(EarlyExit, program, {"count": 1})
    with pytest.raises(UsageError, match="there is no exit exit_7") as caught:
        at_exit(program, "exit_7")
    assert caught.value.reason == "there are exit_0, last"
    with pytest.raises(UsageError) as caught:
        make_terms((Exits(use="exits"),))[0].total(_no_taps(), 0.0)
    assert caught.value.hint == "put `use: depth.early_exit` before the training"


def _no_taps():
    from fxcompress.train.losses import Outcome

    return Outcome(torch.zeros(1, 2), None, (), torch.zeros(1, dtype=torch.long))


def test_it_plans_from_meta_weights():
    with torch.device("meta"):
        model = Transformer(width=64, depth=6)
    program = capture(model, token_batches(1)[0], dynamic=SIZES)
    result = apply(EarlyExit, program, {"count": 2})
    assert [each.block for each in result.decision.exits] == [1, 3]
    assert [each.name for each in early_exits(result.program)] == ["exit_0", "exit_1"]
    assert "33." in result.decision.summary()[0]


@pytest.mark.golden("passes/depth/early_exit")
def test_golden(golden_graph):
    program = apply(EarlyExit, program_of(True, 3), {"count": 1}).program
    golden_graph(hash_weights_(program))
