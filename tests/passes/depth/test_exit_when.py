"""Thresholds of early exits: entropy, the search, per-sample answers, and refusals."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.errors import DataError, UsageError
from fxcompress.ir import capture
from fxcompress.nn import Exit
from fxcompress.nn.exits import uncertainty
from fxcompress.pipeline.context import Context
from fxcompress.rewrite import at_exit, early_exits
from fxcompress.testing import hash_weights_
from fxcompress.train.metrics import BUILT_IN
from passes.depth.early_exit import EarlyExit
from passes.depth.exit_when import ExitWhen
from tests.passes.models import Transformer, token_batches
from tests.passes.support import apply, seeded

SIZES = {"ids": {0: "batch", 1: "seq"}}


@cache
def exits_of(depth=4, count=2):
    model = seeded(lambda: Transformer(width=16, depth=depth, heads=2))
    program = capture(model, token_batches(1)[0], dynamic=SIZES, verify=False)
    return apply(EarlyExit, program, {"count": count}).program


@cache
def labelled():
    """Return batches labelled by the model without exits, which so is always right."""
    with torch.no_grad():
        return tuple((b, exits_of()(*b).argmax(1)) for b in token_batches(6, batch=16))


def context(metric=True):
    accuracy = replace(BUILT_IN["accuracy"], split="calibration")
    return Context(data={"calibration": labelled()}, metric=accuracy if metric else None)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=6),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_uncertainty_is_finite_and_from_0_to_1(logits, dtype):
    z = torch.tensor([logits]).to(dtype)
    for criterion in ("entropy", "probability"):
        found = uncertainty(z, criterion)
        assert found.dtype == torch.float32
        assert 0 <= found.item() <= 1 + 1e-6
    p = torch.softmax(z.double(), -1)
    wanted = torch.special.entr(p).sum(-1) / torch.log(torch.tensor(float(len(logits))))
    assert uncertainty(z, "entropy").item() == pytest.approx(wanted.item(), abs=1e-3)


def test_uncertainty_takes_logits_that_overflow_an_exponential():
    z = torch.tensor([[1e30, 0.0, -1e30], [3e38, 3e38, -3e38], [0.0, -torch.inf, -torch.inf]])
    found = uncertainty(z, "entropy")
    wanted = torch.tensor([0.0, 0.6309, 0.0])
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert uncertainty(torch.zeros(1, 5), "entropy").item() == pytest.approx(1.0)


@pytest.mark.parametrize("criterion", ["entropy", "probability"])
def test_each_sample_gets_the_answer_of_its_first_sure_exit(criterion):
    program = exits_of()
    thresholds = [0.97, 0.96] if criterion == "entropy" else [0.75, 0.74]
    result = apply(ExitWhen, program, {"thresholds": thresholds, "criterion": criterion})
    ids = token_batches(1, batch=32, seq=6, seed=8)[0][0]
    answers = [at_exit(program, name)(ids) for name in ("exit_0", "exit_1", "last")]
    wanted = answers[2].clone()
    for place in (1, 0):
        sure = uncertainty(answers[place], criterion) < thresholds[place]
        wanted[sure] = answers[place][sure]
    got = result.program(ids)
    assert torch.equal(got, wanted)
    # What else is in the batch changes no answer, up to how kernels add up.
    alone = torch.cat([result.program(ids[i : i + 1]) for i in range(len(ids))])
    torch.testing.assert_close(alone, got, rtol=1e-5, atol=1e-6)
    assert not torch.equal(got, answers[2])
    assert [e.name for e in early_exits(result.program)] == ["exit_0", "exit_1"]
    for name, answer in zip(("exit_0", "exit_1", "last"), answers, strict=True):
        assert torch.equal(at_exit(result.program, name)(ids), answer)


@pytest.mark.parametrize(
    "drop",
    [pytest.param(0.0, marks=pytest.mark.slow), 0.05, pytest.param(0.2, marks=pytest.mark.slow)],
)
def test_the_metric_is_kept(drop):
    options = {"metric_drop": drop, "calibration": 96}
    result = apply(ExitWhen, exits_of(), options, context())
    got, whole = result.decision.metric
    assert whole == 1.0
    assert got >= 1.0 - drop - 1e-9
    measured = context().evaluate(result.program)
    assert measured == pytest.approx(got)
    taken = [each.samples for each in result.decision.exits]
    costs = [each.compute for each in result.decision.exits]
    mean = sum(t * c for t, c in zip(taken, costs, strict=True))
    mean += (1 - sum(taken)) * result.decision.last
    assert result.decision.compute == pytest.approx(mean)
    common = [p.compute for p in result.decision.curve if p.metric >= 1.0 - drop - 1e-9]
    assert result.decision.compute <= min(common) + 1e-12
    (curve,) = result.decision.figures()
    assert curve.chosen == (result.decision.compute, got)
    assert curve.points == tuple(sorted(curve.points, key=lambda p: p[0]))


def test_the_compute_is_kept_to():
    shares = [
        apply(ExitWhen, exits_of(), {"compute": share, "calibration": 96}, context(False))
        .decision.compute
        for share in ("40%", "80%")
    ]  # fmt: skip
    assert all(got <= share for got, share in zip(shares, (0.4, 0.8), strict=True))
    assert shares == sorted(shares)


def test_a_plan_reads_no_data_and_takes_no_exit():
    decision = ExitWhen().decide(
        exits_of(), ExitWhen.Options(metric_drop="1pt"), Context(planning=True)
    )
    assert decision.pending == ("2 thresholds: known after calibration",)
    assert [each.threshold for each in decision.exits] == [0.0, 0.0]
    ids = token_batches(1, batch=4)[0][0]
    early = torch.full((4, 7), 1e9)
    assert torch.equal(Exit("e", 0.0)(early, torch.zeros(4, 7)), torch.zeros(4, 7))
    assert exits_of()(ids).shape == (4, 7)


@pytest.mark.parametrize(
    ("options", "what", "reason"),
    [
        ({"thresholds": [0.5]}, "there are 1 thresholds for 2 exits",
         "the exits are exit_0, exit_1"),
        ({"compute": "10%", "calibration": 16}, "10.0% of the compute cannot be met",
         "25.1% is what the first exit alone needs"),
    ],
)  # fmt: skip
def test_targets_that_cannot_be_met(options, what, reason):
    with pytest.raises(UsageError) as caught:
        apply(ExitWhen, exits_of(), options, context())
    assert (caught.value.what, caught.value.reason) == (what, reason)


def test_what_is_missing_is_named():
    with pytest.raises(DataError, match="there is no metric to keep"):
        apply(ExitWhen, exits_of(), {"metric_drop": "1pt", "calibration": 16}, context(False))
    with pytest.raises(UsageError, match="the model has no early exits"):
        apply(ExitWhen, at_exit(exits_of(), "last"), {"thresholds": [0.1]})
    done = apply(ExitWhen, exits_of(), {"thresholds": [0.5, 0.5]}).program
    with pytest.raises(UsageError, match="the exits have thresholds already"):
        apply(ExitWhen, done, {"thresholds": [0.1, 0.1]})


class Tokens(Transformer):
    """Answers at every token."""

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def test_an_answer_for_every_token_has_no_thresholds():
    program = capture(seeded(lambda: Tokens(width=8, heads=2)), token_batches(1)[0],
                      dynamic=SIZES, verify=False)  # fmt: skip
    exits = apply(EarlyExit, program, {"count": 1}).program
    with pytest.raises(UsageError) as caught:
        apply(ExitWhen, exits, {"thresholds": [0.1]})
    assert caught.value.reason == "it is f32[batch,seq,7], and not [batch, classes]"


@pytest.mark.golden("passes/depth/exit_when")
def test_golden(golden_graph):
    program = apply(ExitWhen, exits_of(3, 1), {"thresholds": [0.9]}).program
    golden_graph(hash_weights_(program))
