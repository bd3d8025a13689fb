"""Experts go, and the model is as if the router had never chosen them."""

import json

import pytest
import torch
from torch import fx

from fxcompress.errors import DataError, SelectorError, UsageError
from fxcompress.ir import capture, op_name
from fxcompress.pipeline import Context
from fxcompress.testing import check_pass, hash_weights_
from fxcompress.train.metrics import Metric
from passes.moe.prune_experts import PruneExperts
from tests.passes.moe.architectures import CONFIGS
from tests.passes.moe.architectures import captured as architecture
from tests.passes.moe.mixtures import EXPERTS, SPELLINGS, WIDTH
from tests.passes.support import apply

GROUPED = {"DeepseekV2", "DeepseekV3", "Glm4Moe", "Dots1"}
FAST = ("Mixtral", "DeepseekV3")


class Masked(fx.Interpreter):
    """Runs a Program with the scores of some experts at −∞, wherever they are made."""

    def __init__(self, program, gone, count):
        super().__init__(program.module)
        self.gone, self.count = list(gone), count

    def run_node(self, n):
        value = super().run_node(n)
        name = str(n.meta.get("scope", "")) + str(n.target)
        is_score = op_name(n) == "linear" and value.shape[-1] == self.count and "attn" not in name
        is_bias = n.op == "get_attr" and "correction" in name and value.shape[-1] == self.count
        if is_score or is_bias:
            value = value.clone()
            value[..., self.gone] = float("-inf")
        return value


def spelled(name):
    torch.manual_seed(0)
    model = SPELLINGS[name]()
    x = torch.randn(3, 5, WIDTH)
    return capture(model, (x,), dynamic={"x": {0: "batch", 1: "seq"}}, verify=False)


def batches(count=2):
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(2, 5, WIDTH, generator=generator),) for _ in range(count)]


def difference(left, right):
    return float((left - right).abs().max() / right.abs().max())


def first(output):
    return output[0] if isinstance(output, tuple | list) else output


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS]
)
def test_it_equals_the_router_with_scores_at_minus_infinity(name):
    program = architecture(name)
    gone = [1, 6] if name in GROUPED else [1]
    count = 8 if name in GROUPED else 4
    result = check_pass(PruneExperts, program, {"experts": [gone]}, idempotent=False)
    ids = torch.randint(2, 40, (3, 9))
    with torch.no_grad():
        wanted = first(Masked(program, gone, count).run(ids, enable_io_processing=False))
        got = first(fx.Interpreter(result.program.module).run(ids, enable_io_processing=False))
    assert difference(got, wanted) < 1e-5
    (leaf,) = [n for n in result.program.nodes if op_name(n) == "experts"]
    assert result.program.module.get_submodule(str(leaf.target)).experts == count - len(gone)


@pytest.mark.parametrize("name", ["MaskedLoop", "Stacked", "TopOne"])
def test_so_do_mixtures_that_are_written_by_hand(name):
    program = spelled(name)
    result = check_pass(PruneExperts, program, {"experts": [[0, 2]]}, idempotent=False)
    (x,) = batches(1)[0]
    wanted = Masked(program, [0, 2], EXPERTS).run(x, enable_io_processing=False)
    got = result.program.module(x)
    assert difference(got.detach(), first(wanted).detach()) < 1e-5
    assert result.decision.lifted


def observed(program, data):
    """Return weights, indices and tokens of the leaf in the lifted program, by its definition."""
    from passes.moe.lift import Lift

    lifted = apply(Lift, program, {}).program
    (leaf,) = [n for n in lifted.nodes if op_name(n) == "experts"]
    rows = []

    class Watch(fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if n is leaf:
                rows.append([self.env[each].detach().flatten(0, -2) for each in n.args])
            return value

    for (x,) in data:
        Watch(lifted.module).run(x, enable_io_processing=False)
    x, weights, indices = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return lifted.module.get_submodule(str(leaf.target)), x, weights, indices


def test_criteria_are_what_they_say():
    program, data = spelled("MaskedLoop"), batches()
    leaf, x, weights, indices = observed(program, data)
    wanted = {"frequency": [], "mass": [], "reap": []}
    for expert in range(EXPERTS):
        chosen = indices == expert
        own = weights[chosen].detach()
        made = leaf.apply_expert(expert, x).detach()
        norms = made.norm(dim=-1).unsqueeze(-1).expand_as(weights)[chosen]
        wanted["frequency"].append(float(chosen.sum()))
        wanted["mass"].append(float(own.sum()))
        wanted["reap"].append(float((own * norms).mean()) if len(own) else 0.0)
    for criterion, scores in wanted.items():
        options = {"count": 2, "criterion": criterion, "calibration": 4}
        decision = check_pass(
            PruneExperts, program, options, data={"calibration": data}, idempotent=False
        ).decision
        (mixture,) = decision.mixtures
        assert mixture.scores == pytest.approx(scores, rel=1e-5)
        best = sorted(range(EXPERTS), key=lambda e, s=scores: -s[e])[:2]
        assert list(mixture.kept) == sorted(best)


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_the_metric_without_each_expert(higher_is_better):
    program = spelled("MaskedLoop")
    data = [(x, torch.zeros(len(x))) for x in batches()]

    def size(model, batches):
        return float(torch.stack([first(model(*x)).square().mean() for x, _ in batches]).mean())

    @torch.no_grad()
    def without(gone):
        masked = Masked(program, gone, EXPERTS)
        return size(lambda x: masked.run(x, enable_io_processing=False), data)

    metric = Metric("size", size, higher_is_better=higher_is_better)
    options = {"count": 2, "criterion": "metric", "calibration": 4}
    (mixture,) = apply(
        PruneExperts, program, options, Context(data={"calibration": data}, metric=metric)
    ).decision.mixtures
    sign = 1 if higher_is_better else -1
    lost = [sign * (without([]) - without([expert])) for expert in range(EXPERTS)]
    assert mixture.scores == pytest.approx(lost, rel=1e-4)
    assert list(mixture.kept) == sorted(sorted(range(EXPERTS), key=lambda e: -lost[e])[:2])
    with pytest.raises(DataError, match="no metric to rank experts by"):
        apply(PruneExperts, program, options, Context(data={"calibration": data}))


def test_padding_does_not_count():
    from passes.moe._prune.scores import Saliency, _add
    from passes.moe._routing import Mixture

    leaf, x, weights, indices = observed(spelled("MaskedLoop"), batches(1))
    mixture = Mixture("experts", leaf, ())
    whole, part = Saliency.of(EXPERTS), Saliency.of(EXPERTS)
    mask = torch.arange(len(x)) < 4
    _add(whole, mixture, (x, weights, indices), mask, outputs=True)
    _add(part, mixture, (x[:4], weights[:4], indices[:4]), None, outputs=True)
    for one, other in zip(vars(whole).values(), vars(part).values(), strict=True):
        assert torch.equal(one, other)


def test_chance_is_the_seed_s():
    program = spelled("Stacked")
    options = {"count": 2, "criterion": "random"}
    kept = [
        PruneExperts().decide(program, PruneExperts.Options(**options), Context(seed=seed))
        for seed in (0, 0, 1, 2, 3)
    ]
    assert kept[0] == kept[1]
    assert len({each.mixtures[0].kept for each in kept}) > 1


class TwoMixtures(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = SPELLINGS["Stacked"](), SPELLINGS["MaskedLoop"]()
        self.first.out, self.second.out = torch.nn.Identity(), torch.nn.Identity()

    def forward(self, x):
        return self.second(self.first(x))


def two():
    torch.manual_seed(0)
    model = TwoMixtures()
    return capture(model, (torch.randn(2, 5, WIDTH),), dynamic="batch", verify=False)


def test_globally_those_go_whose_share_is_least_and_enough_are_left():
    options = {"count": 1, "scope": "global", "calibration": 4, "criterion": "frequency"}
    result = check_pass(
        PruneExperts, two(), options, data={"calibration": batches()}, idempotent=False
    )
    mixtures = result.decision.mixtures
    assert sum(each.before - len(each.kept) for each in mixtures) == 2
    shares = {
        (each.path, e): each.scores[e] / sum(each.scores)
        for each in mixtures
        for e in range(each.before)
    }
    gone = [k for k in shares if k[1] not in next(m.kept for m in mixtures if m.path == k[0])]
    assert sorted(shares.values())[:2] == sorted(shares[k] for k in gone)


def test_lists_are_one_for_each_in_graph_order():
    result = check_pass(PruneExperts, two(), {"experts": [[0], [1, 2]]}, idempotent=False)
    assert [each.kept for each in result.decision.mixtures] == [(1, 2, 3), (0, 3)]


def refused(program, **options):
    with pytest.raises(UsageError) as caught:
        PruneExperts().decide(
            program, PruneExperts.Options.model_validate_json(json.dumps(options)), Context()
        )
    return caught.value


def test_more_experts_must_be_left_than_a_token_takes():
    error = refused(spelled("Stacked"), count=3, criterion="random")
    assert str(error).splitlines()[0].endswith("top_k 2 is above the number of experts left 1")
    assert error.reason == "each token of experts takes 2 of 4 experts"
    assert error.hint == "keep at least 2, or put `use: moe.change_top_k` with `top_k: 1` before"


def test_groups_stay_equal():
    program = architecture("DeepseekV3")
    error = refused(program, count=3, criterion="random")
    assert error.reason == "its router chooses among 2 groups of equal size"
    assert error.hint == "take `scope: layer` and a multiple of 2"
    error = refused(program, experts=[[0, 1]])
    assert "and they would lose 2, 0" in error.reason
    error = refused(program, count=6, criterion="random")
    assert "keep at least 2" in error.hint or "let fewer go" in error.hint


def test_bad_lists_are_told():
    program = spelled("Stacked")
    assert refused(program, experts=[[4]]).reason == "there are 4"
    assert "give one for each" in refused(two(), experts=[[0], [1], [2]]).hint
    assert refused(program, ratio=0.1, criterion="random").hint == "give at least 0.250"
    model = capture(torch.nn.Linear(3, 3), (torch.randn(2, 3),))
    with pytest.raises(SelectorError, match="there are no experts"):
        PruneExperts().decide(model, PruneExperts.Options(count=1), Context())


def test_scores_that_something_else_reads_keep_a_mixture():
    class Leaky(SPELLINGS["Stacked"]):
        def forward(self, x):
            return super().forward(x), self.router(self.inp(x)).softmax(-1)

    torch.manual_seed(0)
    program = capture(Leaky(), (torch.randn(2, 5, WIDTH),), dynamic="batch", verify=False)
    result = check_pass(PruneExperts, program, {"experts": [[0]]}, edits=0)
    assert list(result.reasons().values()) == ["something else calls its router"]
    assert not result.decision.lifted


def test_planning_on_the_meta_device_reads_no_data():
    with torch.device("meta"):
        model = SPELLINGS["Stacked"]()
        x = torch.randn(3, 5, WIDTH)
    program = capture(model, (x,), dynamic={"x": {0: "batch", 1: "seq"}})
    options = PruneExperts.Options(ratio=0.5)
    decision = PruneExperts().decide(program, options, Context(planning=True))
    assert decision.pending
    assert len(decision.mixtures[0].kept) == 2
    options = PruneExperts.Options(ratio=0.5, criterion="random")
    decision = PruneExperts().decide(program, options, Context(planning=True))
    assert not decision.pending
    check_pass(PruneExperts, program, {"experts": [[1]]}, tolerance=None, idempotent=False)


@pytest.mark.golden("passes/moe/prune_experts")
def test_golden(golden_graph):
    program = hash_weights_(spelled("MaskedLoop"))
    golden_graph(apply(PruneExperts, program, {"experts": [[1, 2]]}).program)
