"""quantize.mixed: costs as stored, the best allocation, budgets, and what cannot be met."""

import itertools
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

from fxcompress.analysis import cost
from fxcompress.errors import DataError, MissingExtraError, UsageError
from fxcompress.ir import capture
from fxcompress.ir.ops import op_name
from fxcompress.pipeline.context import Context
from fxcompress.train.metrics import Metric
from passes._choices.programme import Problem, solve
from passes.quantize._mixed import timed
from passes.quantize._mixed.hessian import mean_traces
from passes.quantize.mixed import Mixed
from tests.passes.models import ResNet, Transformer, image_batches, token_batches
from tests.passes.quantize.quantised import folded
from tests.passes.support import apply, captured, sqnr


def images():
    return Context(data={"calibration": image_batches(2, 4)})


@pytest.fixture(scope="module")
def resnet():
    return folded(ResNet, 2, 3, 16, 16)


def mixed(program, budget, context=None, **options):
    options = {"calibration": 8, "budget": budget, **options}
    return apply(Mixed, program, options, context or images())


def bits(result):
    return {each.tensor: each.bits for each in result.decision.layers}


class TestAllocation:
    @pytest.mark.parametrize("seed", range(5))
    def test_it_is_the_best_of_all(self, seed):
        random = np.random.default_rng(seed)
        sizes = [sorted(random.integers(1, 50, 3).tolist()) for _ in range(6)]
        losses = [sorted((10 ** random.uniform(-9, 0, 3)).tolist(), reverse=True) for _ in range(6)]
        limit = sum(row[1] for row in sizes)
        problem = Problem({"bytes": sizes, "loss": losses}, "loss", {"bytes": limit})
        allowed = [
            picked
            for picked in itertools.product(range(3), repeat=6)
            if problem.total("bytes", picked) <= limit
        ]
        best = min(problem.total("loss", picked) for picked in allowed)
        found = solve(problem)
        assert problem.total("loss", found) == pytest.approx(best, rel=1e-9)
        assert problem.total("bytes", found) <= limit

    def test_limits_that_exclude_each_other_have_no_answer(self):
        costs = {"bytes": [[1, 9]], "loss": [[9.0, 1.0]]}
        assert solve(Problem(costs, "bytes", {"bytes": 5, "loss": 5.0})) is None

    def test_without_scipy_the_extra_is_named(self, monkeypatch, resnet):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        monkeypatch.setitem(sys.modules, "scipy", None)
        with pytest.raises(MissingExtraError, match=r"fxcompress\[mixed\]"):
            mixed(resnet, {"size": "20%"})


class TestSize:
    @pytest.mark.parametrize("weights", [{}, {"symmetric": True}, {"group": 8}])
    def test_the_result_is_as_large_as_was_decided(self, resnet, weights):
        targets = ["layer*", "head"]
        result = mixed(resnet, {"size": "35%"}, weights=weights, targets=targets)
        assert cost(result.program).bytes == result.decision.bytes
        assert result.decision.bytes <= 0.35 * cost(resnet).bytes
        assert len(set(bits(result).values())) > 1

    def test_with_activations_it_keeps_the_budget(self, resnet):
        result = mixed(resnet, {"size": "20%"}, activations={"observer": "minmax"})
        assert cost(result.program).bytes <= 0.2 * cost(resnet).bytes
        widths = {each.tensor: each.bits for each in result.decision.static.weights}
        assert widths == {name: b for name, b in bits(result).items() if b != 16}
        assert len(set(widths.values())) > 1

    @pytest.mark.parametrize("sensitivity", ["output", "sqnr", "hessian"])
    def test_it_loses_less_than_one_width_for_all(self, resnet, sensitivity):
        uniform = mixed(resnet, {"size": "100%"}, choices=[4])
        size = cost(uniform.program).bytes
        result = mixed(
            resnet, {"size": f"{size}B"}, choices=[2, 3, 4, 5, 6, 8], sensitivity=sensitivity
        )
        assert cost(result.program).bytes <= size
        x = image_batches(1, 16, seed=9)[0][0]
        assert sqnr(resnet, result.program, x) > sqnr(resnet, uniform.program, x) + 0.5

    def test_a_tied_weight_counts_once(self):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.mid = nn.Embedding(50, 16), nn.Linear(16, 16)
                self.head = nn.Linear(16, 50, bias=False)
                self.head.weight = self.embed.weight

            def forward(self, ids):
                return self.head(self.mid(self.embed(ids)))

        torch.manual_seed(0)
        program = capture(Tied().eval(), token_batches(1)[0])
        context = Context(data={"calibration": token_batches(2)})
        result = mixed(program, {"size": "30%"}, context, embeddings=True)
        assert set(bits(result)) == {"embed.weight", "mid.weight"}
        assert cost(result.program).bytes == result.decision.bytes


class TestBudgets:
    def test_bitops_count_products_times_bits(self, resnet):
        result = mixed(resnet, {"bitops": "11%"}, choices=[2, 4, 8])
        macs = {each.id: each.macs for each in cost(resnet).per_node}
        whole = sum(macs[layer] for e in result.decision.layers for layer in e.layers) * 32 * 32
        spent = sum(macs[layer] * e.bits * 32 for e in result.decision.layers for layer in e.layers)
        assert 0.8 * 0.11 * whole < spent <= 0.11 * whole

    def test_an_sqnr_gives_the_smallest_size_that_is_predicted_to_have_it(self, resnet):
        low, high = (mixed(resnet, {"sqnr": dB}) for dB in (10.0, 30.0))
        assert low.decision.bytes < high.decision.bytes
        assert high.decision.loss <= 10**-3
        x = torch.cat([batch[0] for batch in image_batches(2, 4)])
        assert sqnr(resnet, high.program, x) > 26

    def test_a_metric_is_kept(self):
        resnet = folded(ResNet, 2, 3, 16, 16, seed=3)
        batches = [(batch, resnet(*batch).argmax(1)) for batch in image_batches(8, 8)]

        def accuracy(model, split):
            hits = [(model(*x).argmax(1) == y).float() for x, y in split]
            return float(torch.cat(hits).mean())

        context = Context(data={"calibration": batches}, metric=Metric("accuracy", accuracy))
        result = mixed(resnet, {"metric_drop": "5pt"}, context, calibration=64)
        loose = mixed(resnet, {"metric_drop": "50pt"}, context, calibration=64)
        assert accuracy(result.program, batches) >= 0.95
        assert loose.decision.bytes <= result.decision.bytes < 0.3 * cost(resnet).bytes

    def test_the_metric_ranks_layers(self, resnet):
        batches = [(batch, resnet(*batch)) for batch in image_batches(2, 4)]

        def closeness(model, split):
            return -float(torch.cat([(model(*x) - y).flatten() for x, y in split]).abs().mean())

        context = Context(data={"calibration": batches}, metric=Metric("closeness", closeness))
        result = mixed(resnet, {"size": "25%"}, context, sensitivity="metric")
        losses = {each.tensor: each.losses for each in result.decision.layers}
        assert all(row[0] > row[-1] == 0 for row in losses.values())


class TestChoices:
    def test_kept_layers_stay_in_float_and_overrides_limit_others(self, resnet):
        result = mixed(
            resnet,
            {"size": "40%"},
            keep=["head"],
            overrides=[{"targets": ["layer1.*"], "choices": [5]}],
        )
        found = bits(result)
        assert found["head.weight"] == 16
        assert {b for name, b in found.items() if name.startswith("layer1.")} == {5}
        assert "stays in float" in result.reasons()["head"]

    def test_important_layers_stay_in_float_where_there_is_room(self, resnet):
        found = bits(mixed(resnet, {"size": "60%"}, choices=[2, 16]))
        assert set(found.values()) == {2, 16}

    def test_a_plan_needs_no_data(self, resnet):
        result = mixed(resnet, {"size": "20%"}, Context(planning=True))
        assert result.decision.pending[0].endswith("known after calibration (8 samples)")
        assert cost(result.program).bytes <= 0.2 * cost(resnet).bytes
        assert not result.decision.figures()

    def test_the_figure_marks_what_was_chosen(self, resnet):
        result = mixed(resnet, {"size": "20%"})
        (figure,) = result.decision.figures()
        assert figure.columns == ("2 bits", "3 bits", "4 bits", "8 bits", "float")
        wide = [2, 3, 4, 8, 16]
        assert [wide[place] for place in figure.chosen] == list(bits(result).values())
        assert all(list(row) == sorted(row, reverse=True) for row in figure.values)


class TestHessian:
    def test_the_trace_of_a_linear_layer_is_that_of_its_inputs(self):
        """Of ½‖Wx‖², the Hessian in a row of W is xxᵀ, whose diagonal has a known mean."""
        torch.manual_seed(0)
        model = nn.Linear(6, 4, bias=False)
        x = torch.randn(64, 6)
        program = capture(model, (x,))
        found = mean_traces(program, ["weight"], [(x,)], Context(), probes=400)["weight"]
        wanted = float(x.square().sum() * 4 / 24 / model(x).detach().square().sum())
        assert found == pytest.approx(wanted, rel=0.1)

    def test_it_serves_a_transformer(self):
        program = capture(Transformer(width=16, depth=2, heads=2).eval(), token_batches(1)[0])
        context = Context(data={"calibration": token_batches(2)})
        result = mixed(program, {"size": "40%"}, context, sensitivity="hessian")
        assert len(set(bits(result).values())) > 1


class Watch:
    """Says how long a Program takes from how many of its weights are quantised."""

    seconds = 0.01

    def __init__(self, program, runtime):
        self.runtime, self.built = runtime, []

    def ratio(self, program, *, longer=False):
        quantised = sum(op_name(node) == "fake_quant" for node in program.nodes)
        self.built.append(quantised)
        return 1.0 - 0.01 * quantised


IN_ONNXRUNTIME = {"target": "onnxruntime", "activations": {}, "choices": [8, 16]}


class TestLatency:
    @pytest.fixture
    def watches(self, monkeypatch):
        made = []

        def watch(program, runtime):
            made.append(Watch(program, runtime))
            return made[-1]

        monkeypatch.setattr(timed, "Stopwatch", watch)
        return made

    def test_it_is_met_with_as_few_quantised_layers_as_it_takes(self, resnet, watches):
        context = images()
        result = mixed(resnet, {"latency": "75%"}, context, **IN_ONNXRUNTIME)
        (watch,) = watches
        assert watch.runtime == "onnxruntime"
        quantised = sum(op_name(node) == "fake_quant" for node in result.program.nodes)
        assert max(watch.built) > quantised >= 25
        assert {8, 16} == set(bits(result).values())
        before, after = context.measured["latency_ms"]
        assert after == pytest.approx(before * (1 - 0.01 * quantised))

    def test_a_size_beside_it_is_kept(self, resnet, watches):
        result = mixed(resnet, {"latency": "80%", "size": "40%"}, **IN_ONNXRUNTIME)
        assert result.decision.bytes <= 0.4 * cost(resnet).summary().bytes

    def test_what_cannot_be_met_says_the_least(self, resnet, watches):
        with pytest.raises(UsageError, match="30% cannot be met in onnxruntime") as error:
            mixed(resnet, {"latency": "30%"}, **IN_ONNXRUNTIME)
        assert error.value.hint.endswith("ms")

    def test_what_is_met_already(self, resnet, watches):
        with pytest.raises(UsageError, match="20ms is met already"):
            mixed(resnet, {"latency": "20ms"}, **IN_ONNXRUNTIME)

    def test_a_plan_measures_nothing(self, resnet, watches):
        mixed(resnet, {"latency": "75%"}, Context(planning=True), **IN_ONNXRUNTIME)
        assert not watches

    @pytest.mark.slow
    def test_a_runtime_is_timed(self):
        pytest.importorskip("onnxruntime")
        program = folded(lambda: ResNet(width=32), 2, 3, 64, 64)
        context = Context(data={"calibration": [(torch.randn(4, 3, 64, 64),)] * 2})
        mixed(program, {"latency": "60%"}, context, **IN_ONNXRUNTIME)
        before, after = context.measured["latency_ms"]
        assert after <= 0.6 * before


class TestErrors:
    def test_a_size_that_cannot_be_met_says_what_can(self, resnet):
        with pytest.raises(UsageError) as error:
            mixed(resnet, {"size": "3%"}, keep=["head"])
        assert "the smallest reachable is" in error.value.reason
        assert "layer2.1.conv1.weight (at 2 bits" in error.value.reason
        least = int(error.value.hint.split()[-1].removesuffix("B"))
        assert mixed(resnet, {"size": f"{least}B"}, keep=["head"]).decision.bytes == least
        with pytest.raises(UsageError):
            mixed(resnet, {"size": f"{least - 1}B"}, keep=["head"])

    def test_bitops_that_cannot_be_met(self, resnet):
        with pytest.raises(UsageError, match="1% bitops cannot be met"):
            mixed(resnet, {"bitops": "1%"})

    def test_limits_that_contradict_each_other(self, resnet):
        with pytest.raises(UsageError, match="no allocation keeps the budget") as error:
            mixed(resnet, {"size": "12%", "sqnr": 80.0})
        assert "dB" in error.value.reason

    def test_a_metric_budget_without_a_metric(self, resnet):
        with pytest.raises(DataError, match="no metric"):
            mixed(resnet, {"metric_drop": "1pt"})

    def test_no_calibration_split(self, resnet):
        with pytest.raises(DataError, match="no split calibration"):
            mixed(resnet, {"size": "20%"}, Context())

    def test_what_is_quantised_already(self, resnet):
        once = mixed(resnet, {"size": "25%"}, choices=[4]).program
        with pytest.raises(UsageError, match="no weight to quantise"):
            mixed(once, {"size": "20%"})

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"budget": {}}, "needs size, bitops, latency, sqnr or metric_drop"),
            ({"budget": {"latency": "50%"}}, "measured in a runtime: `target` is onnxruntime"),
            (
                {"budget": {"latency": "50%", "bitops": "9%"}, "target": "onnxruntime"},
                "leave `bitops` out",
            ),
            (
                {"budget": {"latency": "50%", "sqnr": 9.0}, "target": "onnxruntime"},
                "give one of latency, sqnr and metric_drop",
            ),
            (
                {"budget": {"size": "9%"}, "activations": {}, "target": "onnxruntime"},
                "onnxruntime's integer kernels take weights of 8 bits, not of 2",
            ),
            ({"budget": {"size": "9%"}, "choices": [1]}, "1 bits are no choice"),
            ({"budget": {"size": "9%"}, "choices": [12]}, "12 bits are no choice"),
            ({"budget": {"sqnr": 9.0}, "sensitivity": "sqnr"}, "needs `sensitivity: output`"),
            (
                {"budget": {"size": "9%"}, "activations": {}, "weights": {"group": 8}},
                "leave out `weights.group`",
            ),
        ],
    )
    def test_options_that_contradict_each_other(self, options, message):
        with pytest.raises(ValueError, match=message):
            Mixed.Options.model_validate_json(json.dumps(options))


def test_mobile_layers_are_captured_once():
    """A module that is called twice has one weight and both its uses are counted."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.b(self.a(self.a(x).relu()))

    program = captured(Twice, 2, 8)
    context = Context(data={"calibration": [(torch.randn(8, 8),)]})
    result = mixed(program, {"size": "40%"}, context, choices=[2, 4, 8])
    entry = next(each for each in result.decision.layers if each.tensor == "a.weight")
    assert entry.layers == ("a", "a@2")
    assert entry.bitops[0] == 2 * 64 * 2 * 32
