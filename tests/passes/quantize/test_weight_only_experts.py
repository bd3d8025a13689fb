"""Experts' matrices as integers: each as the weight of a linear layer, in a format of its own."""

import json
from functools import cache

import pytest
import torch
from torch import nn

from fxcompress.analysis.cost import cost
from fxcompress.errors import NumericsError, SelectorError, UsageError
from fxcompress.ir import Program, capture
from fxcompress.ir._packing import pack_weights
from fxcompress.ir.ops import module_of, op_name
from fxcompress.pipeline import Context
from fxcompress.testing import check_pass, hash_weights_
from passes.moe.merge_experts import MergeExperts
from passes.moe.prune_experts import PruneExperts
from passes.moe.to_dense import ToDense
from passes.prune.channels import Channels
from passes.quantize.weight_only import WeightOnly
from tests.passes.moe.leaves import HIDDEN, WIDTH, mixture, program_of, tokens
from tests.passes.moe.mixtures import Stacked
from tests.passes.support import apply, sqnr

EXPERTS = 6
MATRICES = ("gate", "up", "down")


@cache
def program():
    return program_of(mixture())


def quantised(found, options):
    settings = {"calibration": 32, "group": None, **options}
    return apply(WeightOnly, found, settings, Context(data={"calibration": tokens()}))


def checked(found, options):
    return check_pass(WeightOnly, found, {"group": None, **options}, idempotent=False)


def widths(result, matrix="up", block=0):
    path = f"blocks.{block}.experts_{matrix}_fq"
    return result.program.module.get_submodule(path).widths


def alone(matrix, options):
    """Return what the pass makes of a matrix in a linear layer: the weight, scale, zero point."""
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    layer.weight = nn.Parameter(matrix.clone())
    found = capture(nn.Sequential(layer), (torch.randn(2, matrix.shape[1]),), verify=False)
    state = apply(WeightOnly, found, options).program.state()
    names = ("0.weight", "0_weight_fq.scale", "0_weight_fq.zero_point")
    return [state[name].detach() for name in names]


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "method"),
    [
        (8, None, True, "rtn"), (8, 4, False, "rtn"), (4, 4, True, "rtn"), (4, 5, False, "hqq"),
        (3, None, False, "rtn"), (2, 4, False, "hqq"), (4, 128, False, "rtn"),
    ],
)  # fmt: skip
def test_a_matrix_is_rounded_as_in_a_linear_layer(bits, group, symmetric, method):
    # Groups of 5 divide neither 8 nor 12: the last of a row is shorter, in both forms.
    options = {"bits": bits, "group": group, "symmetric": symmetric, "method": method}
    found = program()
    result = quantised(found, {**options, "targets": ["*.experts"]})
    state, before = result.program.state(), found.state()
    for matrix in MATRICES:
        for expert in (0, EXPERTS - 1):
            path = f"blocks.1.experts_{matrix}_fq"
            own = (
                state[f"blocks.1.experts.{matrix}"],
                state[f"{path}.scale"],
                state[f"{path}.zero_point"],
            )
            wanted = alone(before[f"blocks.1.experts.{matrix}"][expert].detach(), options)
            assert torch.equal(own[0][expert], wanted[0])
            assert torch.equal(own[1][expert], wanted[1])
            middle = 2 ** (bits - 1) if symmetric else 0
            assert torch.equal(own[2][expert] - middle, wanted[2])


def test_the_graph_and_what_is_said():
    result = checked(program(), {"bits": 4, "targets": ["blocks.0.experts"]})
    lines = [" ".join(line.split(" : ")[0].split()) for line in result.graph.splitlines()]
    names = [f"%blocks.0.experts_{m}_fq" for m in ("up", "down", "gate")]
    assert f"{names[0]} = stack_quant(%blocks.0.experts.up) {{bits=4}}" in lines
    (call,) = (line for line in lines if line.startswith("%blocks.0.experts = "))
    assert f"{', '.join(names)})" in call
    assert result.decision.summary() == (
        "18 experts' matrices as 4-bit integers per channel (rtn)",
    )
    assert result.reasons()["blocks.1.experts"] == "it is not selected"
    # 4 bits each, five bytes for each row's scale and zero point.
    saved = cost(result.before).bytes - cost(result.program).bytes
    rows = EXPERTS * (2 * HIDDEN + WIDTH)
    assert saved == 3 * EXPERTS * WIDTH * HIDDEN * (4 - 0.5) - rows * 5


def test_overrides_choose_experts_and_matrices_by_id():
    overrides = [
        {"targets": ["blocks.0.experts.2"], "bits": 2},
        {"targets": ["*.experts.[45].down"], "bits": 8, "symmetric": True},
        {"targets": ["*.experts.0"], "bits": "float"},
        {"targets": ["blocks.1.experts"], "bits": 3},
    ]
    found = program()
    result = checked(found, {"bits": 4, "overrides": overrides})
    assert widths(result) == (0, 4, 2, 4, 4, 4)
    assert widths(result, "down") == (0, 4, 2, 4, 8, 8)
    assert widths(result, "down", block=1) == (0, 3, 3, 3, 8, 8)
    kept = result.program.state()["blocks.0.experts.up"][0]
    assert torch.equal(kept, found.state()["blocks.0.experts.up"][0])
    assert (
        "blocks.0.experts: experts 0 in float; 2 in 2 bits; "
        "in `down` 0 in float; 2 in 2 bits; 4, 5 in 8 bits" in result.decision.summary()
    )


def test_experts_are_excluded_and_selected_like_layers():
    result = quantised(program(), {"exclude": ["*.experts.1", "*.experts.*.down"]})
    assert widths(result) == (4, 0, 4, 4, 4, 4)
    (call, _) = (n for n in result.program.nodes if op_name(n) == "experts")
    assert op_name(call.args[4]) == "param"
    reasons = result.reasons()
    assert reasons["blocks.0.experts"] == "down: it is not selected"
    only = quantised(program(), {"targets": ["blocks.*.experts.3.up"], "expect": 2})
    assert widths(only) == (0, 0, 0, 4, 0, 0)


class Chosen(torch.fx.Interpreter):
    """Counts which experts a block's tokens choose."""

    def run_node(self, n):
        value = super().run_node(n)
        if op_name(n) == "experts":
            counts = self.env[n.args[2]].flatten().bincount(minlength=EXPERTS)
            self.counts = [*getattr(self, "counts", []), counts.tolist()]
        return value


def test_rarely_used_experts_get_fewer_bits():
    options = {"bits": 4, "overrides": [{"targets": ["*.experts"], "rarest": 0.5, "bits": 2}]}
    found = program()
    result = quantised(found, options)
    chosen = Chosen(found.module)
    chosen.run(tokens()[0][0][:32], enable_io_processing=False)
    for block, counts in enumerate(chosen.counts):
        rare = sorted(range(EXPERTS), key=lambda e: (counts[e], e))[: EXPERTS // 2]
        assert widths(result, block=block) == tuple(2 if e in rare else 4 for e in range(EXPERTS))
    planned = WeightOnly().decide(found, _options(options), Context(planning=True))
    assert "which of its experts are rare" in planned.pending[-1]


def _options(options):
    return WeightOnly.Options.model_validate_json(
        json.dumps({"group": None, "calibration": 32, **options})
    )


@pytest.mark.parametrize(
    ("override", "error", "message", "way_out"),
    [
        ({"targets": ["*.experts.6"], "bits": 2}, SelectorError, "matches nothing", "0 to 5"),
        ({"targets": ["*.expert.1"], "bits": 2}, SelectorError, "matches nothing", ""),
        ({"targets": ["*.experts.1"], "group": 4}, UsageError, "different groups", "for none"),
        ({"targets": ["head"], "rarest": 0.5}, SelectorError, "selects no expert", "experts"),
        ({"targets": ["*.experts"], "rarest": 0.1}, UsageError, "is none", "0.167"),
    ],
)
def test_overrides_that_fit_nothing(override, error, message, way_out):
    context = Context(data={"calibration": tokens()})
    with pytest.raises(error, match=message) as caught:
        WeightOnly().decide(program(), _options({"overrides": [override]}), context)
    assert way_out in (caught.value.hint or "")


def test_a_nan_is_named_with_its_expert():
    found = program_of(mixture())
    with torch.no_grad():
        found.state()["blocks.1.experts.down"][3, 0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"blocks\.1\.experts\.down\[3\]"):
        WeightOnly().decide(found, _options({}), Context())


def test_quantising_twice_and_stacks_outside_a_leaf_are_declined():
    result = quantised(program(), {"targets": ["*.experts"]})
    again = WeightOnly().decide(result.program, _options({}), Context())
    reasons = {each.node: each.reason for each in again.declined}
    assert reasons["blocks.0.experts"] == "it is quantised already"
    loose = capture(Stacked(), (torch.randn(2, 5, WIDTH),), dynamic="batch", verify=False)
    found = WeightOnly().decide(loose, _options({}), Context())
    assert sum("run moe.lift before" in each.reason for each in found.declined) == 2


def test_it_is_planned_from_meta_weights():
    with torch.device("meta"):
        model = mixture()
    found = capture(model, (torch.empty(2, 4, WIDTH, device="meta"),), verify=False)
    planned = WeightOnly().decide(found, _options({"bits": 4}), Context(planning=True))
    assert len(planned.stacks) == 6
    assert planned.pending[0].endswith("known once the weights have values")


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_on_data_a_matrix_is_rounded_as_in_a_layer_that_reads_the_same(method):
    # Where all experts are chosen, each reads every token.
    found = program_of(mixture(experts=2, k=2))
    options = {"bits": 3, "group": 4, "method": method, "calibration": 32}
    result = quantised(found, {**options, "targets": ["blocks.0.experts"]})
    norm = found.module.get_submodule("blocks.0.norm")
    batch = (norm(tokens()[0][0][:32]).detach(),)
    layer = nn.Sequential(nn.Linear(WIDTH, HIDDEN, bias=False))
    layer[0].weight = nn.Parameter(found.state()["blocks.0.experts.gate"][1].detach().clone())
    context = Context(data={"calibration": [batch]})
    wanted = apply(WeightOnly, capture(layer, batch, verify=False), options, context)
    got = result.program.state()["blocks.0.experts.gate"][1]
    assert torch.equal(got, wanted.program.state()["0.weight"])


def test_data_of_each_expert_s_own_tokens_helps():
    x = tokens(seed=5)[0][0]
    quality = {}
    for method in ("rtn", "gptq"):
        options = {"bits": 3, "method": method, "calibration": 64, "targets": ["*.experts"]}
        result = quantised(program(), {**options, "search": "minmax"})
        quality[method] = sqnr(result.before, result.program, x)
    assert quality["gptq"] > quality["rtn"] + 3


def test_experts_that_no_token_chose_are_rounded_to_nearest_and_named():
    found = program_of(mixture(experts=12))
    options = {"bits": 3, "targets": ["blocks.0.experts"]}
    result = quantised(found, {**options, "method": "gptq", "calibration": 1})
    (unseen,) = {each.unseen for each in result.decision.stacks}
    assert len(unseen) >= 4
    assert any("no token chose" in line for line in result.decision.summary())
    nearest = quantised(found, options).program.state()["blocks.0.experts.down"]
    made = result.program.state()["blocks.0.experts.down"]
    same = [e for e in range(12) if torch.equal(made[e], nearest[e])]
    assert set(unseen) <= set(same) < set(range(12))


MIXED = {
    "group": 4,
    "targets": ["*.experts"],
    "overrides": [
        {"targets": ["*.experts.0"], "bits": "float"}, {"targets": ["*.experts.3"], "bits": 2},
    ],
}  # fmt: skip


def test_pruned_experts_take_their_scales_along():
    result = quantised(program(), MIXED)
    kept = [0, 3, 4, 5]
    options = {"experts": [[1, 2]]}
    pruned = check_pass(PruneExperts, result.program, options, idempotent=False)
    fake = pruned.program.module.get_submodule("blocks.0.experts_down_fq")
    whole = result.program.module.get_submodule("blocks.0.experts_down_fq")
    assert fake.widths == (0, 2, 4, 4)
    assert torch.equal(fake.scale, whole.scale[kept])
    stack = result.program.state()["blocks.0.experts.down"]
    assert torch.equal(pruned.program.state()["blocks.0.experts.down"], stack[kept])
    # They are still on their grids.
    assert torch.equal(fake(stack[kept]), stack[kept])


def test_hidden_units_are_pruned_with_their_scales():
    result = quantised(program(), {**MIXED, "group": None})
    pruned = check_pass(
        Channels, result.program, {"ratio": 0.5, "criterion": "l2"}, idempotent=False
    )
    fake = pruned.program.module.get_submodule("blocks.0.experts_up_fq")
    rows, columns = pruned.program.state()["blocks.0.experts.up"].shape[1:]
    assert rows < HIDDEN
    assert columns <= WIDTH
    assert fake.shape == (EXPERTS, rows)


@pytest.mark.parametrize(
    ("cls", "options"),
    [(MergeExperts, {"ratio": 0.5, "align": "none"}), (ToDense, {"align": "none"})],
)
def test_what_would_leave_the_grid_is_refused(cls, options):
    result = quantised(program(), {"targets": ["*.experts"]})
    context = Context(data={"calibration": tokens()})
    with pytest.raises(UsageError, match="are quantised and cannot be") as caught:
        cls().decide(result.program, cls.Options(calibration=32, **options), context)
    assert "before quantize.weight_only" in str(caught.value.hint)


def test_files_of_a_program_hold_the_integers(tmp_path):
    made = quantised(program(), MIXED).program
    made.save(tmp_path / "model.fxp")
    loaded = Program.load(tmp_path / "model.fxp").state()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in made.state().items())
    stored, _ = pack_weights(made, made.state())
    # A float expert of six, one in 2 bits, four in 4.
    numbers = WIDTH * HIDDEN
    assert stored["blocks.1.experts.gate"].numel() == numbers * (32 + 2 + 4 * 4) // 8
    assert stored["blocks.1.experts_gate_fq.zero_point"].dtype is torch.uint8


def test_gradients_reach_experts_through_the_rounding():
    result = quantised(program(), MIXED)
    module = result.program.copy().module.train()
    module(tokens()[0][0]).square().sum().backward()
    for name, parameter in module.named_parameters():
        if name.endswith((".gate", ".up", ".down")):
            assert parameter.grad is not None, name
            assert bool(parameter.grad.any()), name
    leaf = [n for n in result.program.nodes if op_name(n) == "experts"]
    assert type(module_of(leaf[0])).__name__ == "OperandExperts"


@pytest.mark.golden("passes/quantize/weight_only_experts")
def test_golden(golden_graph):
    golden_graph(quantised(hash_weights_(program_of(mixture())), MIXED).program)
