import json
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxcompress.analysis.cost import cost
from fxcompress.errors import DataError, NumericsError, SelectorError, UsageError
from fxcompress.ir import Program, capture
from fxcompress.ir.ops import op_name
from fxcompress.pipeline.context import Context
from fxcompress.rewrite import GraphRewriter
from fxcompress.testing import check_pass
from passes.prune.channels import Channels
from passes.prune.n_m import NM
from passes.quantize.weight_only import WeightOnly
from tests.passes.models import ResNet, Transformer, image_batches, token_batches
from tests.passes.support import apply, captured, random_input, seeded, sqnr

METHODS = ("rtn", "hqq", "awq", "gptq", "awq+gptq")


@cache
def transformer(seed=0):
    dynamic = {"ids": {0: "batch", 1: "seq"}}
    return capture(
        seeded(lambda: Transformer(width=64), seed), token_batches(1)[0], dynamic=dynamic
    )


def quantised(program, options=None, batches=None):
    data = {"calibration": batches or token_batches(4)}
    options = {"calibration": 16, "group": 32, **(options or {})}
    return check_pass(WeightOnly, program, options, data=data, idempotent=False)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(self.a(x).tanh())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids).tanh())


class Addmm(nn.Module):
    """A layer as GPT-2 has it: the weight is `[in, out]`."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 6, generator=torch.Generator().manual_seed(0)))
        self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


def tied():
    return capture(seeded(Tied), (torch.arange(12).reshape(3, 4),))


def test_the_graph_and_the_edits():
    result = quantised(captured(Pair, 2, 16), {"group": 8})
    form = "{bits=4 signed=False symmetric=False axis=0 group=8}"
    lines = [" ".join(line.split(" : ")[0].split()) for line in result.graph.splitlines()]
    assert [line for line in lines if "fake_quant" in line or "linear" in line] == [
        f"%a_weight_fq = fake_quant(%a.weight) {form}",
        "%a = linear(%x, %a_weight_fq)",
        f"%b_weight_fq = fake_quant(%b.weight) {form}",
        "%b = linear(%/tanh, %b_weight_fq)",
    ]
    assert result.kinds() == {
        "add-node": 4, "change-node": 2, "set-module": 2, "set-tensor": 2, "add-tensor": 4,
    }  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_the_outputs_close(method):
    x = token_batches(1, seed=9)[0]
    found = []
    for bits in (3, 4, 6, 8):
        result = quantised(transformer(), {"bits": bits, "method": method})
        found.append(sqnr(result.before, result.program, *x))
    # Each bit is worth 6 dB.
    assert found[0] > 10
    assert all(later > sooner for sooner, later in pairwise(found))
    assert found[-1] > 35


def test_round_to_nearest_is_the_formula():
    program = captured(Pair, 2, 16)
    result = quantised(program, {"bits": 3, "group": 4, "search": "minmax"})
    weight = program.state()["a.weight"].detach()
    for row in range(8):
        for start in range(0, 16, 4):
            group = weight[row, start : start + 4]
            low, high = min(0.0, float(group.min())), max(0.0, float(group.max()))
            scale = (high - low) / 7
            zero = round(-low / scale)
            wanted = [
                (min(7, max(0, round(float(w) / scale) + zero)) - zero) * scale for w in group
            ]
            made = result.program.state()["a.weight"][row, start : start + 4]
            assert torch.allclose(made, torch.tensor(wanted), atol=1e-6)


def test_clipping_lowers_the_error():
    program = captured(Pair, 2, 16)
    weight = program.state()["a.weight"].detach()
    errors = {}
    for search in ("minmax", "mse"):
        made = quantised(program, {"bits": 2, "group": 16, "search": search}).program.state()
        errors[search] = float((made["a.weight"].detach() - weight).square().sum())
    assert errors["mse"] < errors["minmax"]


@settings(deadline=None, max_examples=30)
@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 2, 4, 8, 16]),
    symmetric=st.booleans(),
    method=st.sampled_from(METHODS),
    seed=st.integers(0, 3),
)
def test_any_format(bits, group, symmetric, method, seed):
    program = captured(Pair, 2, 16, seed=seed)
    options = {"bits": bits, "group": group, "symmetric": symmetric, "method": method}
    exclude = {"exclude": ["b"]} if group == 16 else {}
    result = quantised(program, {**options, **exclude}, [(random_input(16, 16),)])
    entry = result.decision.weights[0]
    scale = result.program.state()["a_weight_fq.scale"]
    assert entry.shape == tuple(scale.shape) == ((8,) if group is None else (8, 16 // group))
    assert bool((scale > 0).all())
    # A row has no more values than there are integers.
    rows = result.program.state()["a.weight"].reshape(-1, group or 16)
    assert max(len(row.unique()) for row in rows) <= 2**bits


def test_a_tied_table_is_quantised_once():
    program = tied()
    left = quantised(transformer(), {"types": ["Linear"]}).reasons()
    assert not left
    with pytest.raises(UsageError, match="set `embeddings: true`"):
        quantised(program, {"group": 16})
    result = quantised(program, {"group": 16, "embeddings": True})
    (entry,) = result.decision.weights
    assert entry.layers == ("embed", "head")
    assert [op_name(n) for n in result.program.nodes].count("fake_quant") == 1
    state = result.program.state()
    assert state["embed.weight"] is state["head.weight"]


def test_embeddings_need_no_data():
    result = quantised(transformer(), {"embeddings": True, "types": ["Embedding"]})
    assert [each.tensor for each in result.decision.weights] == ["embed.weight"]


def test_convolutions_of_all_kinds():
    layers = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=4, padding=1), nn.ConvTranspose2d(8, 6, 2),
        nn.Flatten(), nn.Linear(6 * 49, 3),
    )  # fmt: skip
    program = captured(lambda: layers, 2, 4, 8, 8)
    batches = image_batches(4, 4, 4, 8, 8)
    x = random_input(4, 4, 8, 8)
    for method in METHODS:
        result = quantised(program, {"group": None, "method": method}, batches)
        assert [each.axis for each in result.decision.weights] == [0, 0, 1, 0]
        assert sqnr(result.before, result.program, x) > 12


def test_weights_stored_input_first_have_scales_per_channel():
    program = captured(Addmm, 4, 16)
    x = random_input(32, 16)
    with pytest.raises(UsageError, match="only `group: null` fits"):
        quantised(program, {"group": 4}, [(x,)])
    result = quantised(program, {"group": None, "method": "gptq"}, [(x,)])
    assert result.decision.weights[0].shape == (6,)
    assert sqnr(result.before, result.program, x) > 15


def test_overrides_are_taken_in_order():
    overrides = [{"targets": ["a"], "bits": 8, "group": "channel"}, {"targets": ["*"], "bits": 2}]
    result = quantised(captured(Pair, 2, 16), {"group": 8, "overrides": overrides})
    a, b = result.decision.weights
    assert (a.bits, a.group, b.bits, b.group) == (8, None, 2, 8)
    assert "1 weights as 8-bit integers per channel (rtn)" in result.decision.summary()


def test_what_is_quantised_already_is_declined():
    first = quantised(captured(Pair, 2, 16), {"group": 8, "targets": ["a"]}).program
    second = quantised(first, {"group": 8})
    assert second.reasons() == {"a": "it is quantised already"}
    with pytest.raises(UsageError, match="no weight to quantise"):
        quantised(second.program, {"group": 8})


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_last_group_of_a_row_may_be_shorter(method, symmetric):
    program = captured(Pair, 2, 16)
    x = random_input(64, 16)
    options = {"group": 6, "method": method, "symmetric": symmetric}
    result = quantised(program, options, [(x,)])
    a, b = result.decision.weights
    # Rows of 8 elements end in a group of 2.
    assert (a.shape, b.shape) == ((8, 3), (4, 2))
    assert sqnr(result.before, result.program, x) > 14
    if method == "rtn":
        weight = program.state()["a.weight"].detach()
        alone = result.program.state()["a_weight_fq.scale"][:, 2]
        low, high = weight[:, 12:].amin(1).clamp(max=0), weight[:, 12:].amax(1).clamp(min=0)
        wanted = torch.maximum(-low / 8, high / 7) if symmetric else (high - low) / 15
        assert torch.allclose(alone, wanted)


def test_a_group_longer_than_a_row_is_the_row():
    result = quantised(captured(Pair, 2, 16), {"group": 12})
    a, b = result.decision.weights
    assert (a.group, a.shape) == (12, (8, 2))
    assert (b.group, b.shape) == (None, (4,))


def test_channels_that_share_a_ragged_group_stay():
    program = quantised(transformer(), {"group": 48}).program
    with pytest.raises(SelectorError, match="the last quantisation group is not full"):
        apply(Channels, program, {"ratio": 0.5, "kinds": ["neuron"]})


def test_zeros_and_dead_inputs():
    def build():
        model = Pair()
        nn.init.zeros_(model.a.weight)
        return model

    x = random_input(32, 16)
    x[:, 3] = 0
    for method in METHODS:
        result = quantised(captured(build, 2, 16), {"group": 8, "method": method}, [(x,)])
        assert not bool(result.program.state()["a.weight"].any())
        assert bool(result.program(x).isfinite().all())


def test_bad_numbers_and_missing_data():
    def build():
        model = Pair()
        with torch.no_grad():
            model.b.weight[1, 1] = float("nan")
        return model

    with pytest.raises(NumericsError, match=r"b\.weight"):
        quantised(capture(seeded(build), (torch.zeros(2, 16),), verify=False), {"group": 8})
    bad = torch.full((16, 16), float("inf"))
    with pytest.raises(NumericsError, match=r"a NaN or an infinity in the inputs"):
        quantised(captured(Pair, 2, 16), {"group": 8, "method": "gptq"}, [(bad,)])
    with pytest.raises(DataError):
        apply(WeightOnly, captured(Pair, 2, 16), {"group": 8, "method": "awq"})
    with pytest.raises(SelectorError):
        quantised(captured(Pair, 2, 16), {"group": 8, "targets": ["c"]})


def test_only_some_methods_read_data():
    for method in METHODS:
        options = WeightOnly.Options.model_validate_json(json.dumps({"method": method}))
        reads = WeightOnly().reads(options)
        assert reads == (frozenset() if method in ("rtn", "hqq") else {"calibration"})


def test_a_plan_shows_the_graph_without_numbers():
    program = captured(Pair, 2, 16)
    step = WeightOnly()
    options = step.Options.model_validate_json('{"group": 8, "method": "gptq"}')
    decision = step.decide(program, options, Context(planning=True))
    assert decision.pending[0] == "a.weight: integers known after calibration (32 samples)"
    rewriter = GraphRewriter(program)
    step.rewrite(rewriter, decision)
    step.ensures(program, rewriter.finish(), decision)


def test_pruning_afterwards_cuts_the_scales():
    program = quantised(transformer(), {"group": 16}).program
    options = {"ratio": 0.5, "kinds": ["neuron"]}
    pruned = apply(Channels, program, options).program
    state = pruned.state()
    assert state["layers.0.up_weight_fq.scale"].shape == (128, 4)
    assert state["layers.0.down_weight_fq.scale"].shape == (64, 8)


def test_a_masked_weight_is_quantised_behind_its_mask():
    masked = apply(NM, captured(Pair, 2, 16), {"mode": "keep", "n": 2, "m": 4}).program
    result = quantised(masked, {"group": 8, "symmetric": True})
    weight = result.program.state()["a.weight"]
    assert float((weight == 0).float().mean()) >= 0.5
    assert "fake_quant(%a_weight_mask)" in result.graph


def test_the_cost_counts_bits_scales_and_zero_points():
    program = captured(Pair, 2, 16)
    result = quantised(program, {"bits": 4, "group": 8})
    a, b = (8 * 16, 8 * 16 // 8), (4 * 8, 4 * 8 // 8)
    wanted = sum(weights // 2 + groups * (4 + 1) for weights, groups in (a, b)) + 4 * (8 + 4)
    assert cost(result.program).bytes == wanted


def test_a_file_holds_packed_integers_and_gives_the_program_back(tmp_path):
    program = transformer()
    floats = program.save(tmp_path / "float.fxp").stat().st_size
    before = None
    for bits in (8, 4, 3, 2):
        result = quantised(program, {"bits": bits, "embeddings": True})
        file = result.program.save(tmp_path / f"{bits}.fxp")
        again = Program.load(file)
        assert again.fingerprint() == result.program.fingerprint()
        size = file.stat().st_size
        assert size < floats / 2
        assert before is None or size < before
        before = size


def test_a_resnet_through_unfolded_inputs():
    program = captured(ResNet, 2, 3, 16, 16)
    x = random_input(16, 3, 16, 16)
    found = {
        method: sqnr(program, quantised(
            program, {"group": None, "bits": 4, "method": method}, image_batches(8)).program, x)
        for method in ("rtn", "gptq")
    }  # fmt: skip
    assert found["gptq"] > found["rtn"] + 3
