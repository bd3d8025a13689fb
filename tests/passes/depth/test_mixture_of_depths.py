"""Mixture of depths: exact at capacity 1, equal to the formula, causal in evaluation, refusals."""

import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxcompress.emit._export import export_program
from fxcompress.emit._plain import plain_program
from fxcompress.emit._probes import probes
from fxcompress.errors import UsageError
from fxcompress.ir import capture
from fxcompress.nn import Tap, TopTokens
from fxcompress.pipeline.context import Context
from fxcompress.rewrite.closing import as_emitted
from fxcompress.testing import hash_weights_
from fxcompress.train.joint import join
from fxcompress.train.loss_config import Routing
from fxcompress.train.losses import Outcome, make_terms
from passes.depth.mixture_of_depths import MixtureOfDepths
from tests.passes.models import ResNet, Transformer, token_batches
from tests.passes.support import apply, captured, seeded

SIZES = {"ids": {0: "batch", 1: "seq"}}


class Rotary(nn.Module):
    """A causal model with rotary positions and an explicit mask, both made once for all layers."""

    def __init__(self, width=16, depth=4, heads=2, written=False):
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.layers = nn.ModuleList(RotaryLayer(width, heads, written) for _ in range(depth))
        self.head = nn.Linear(width, 50)

    def forward(self, ids):
        x, places = self.embed(ids), torch.arange(ids.shape[1])
        angles = places[:, None] / 10 ** torch.arange(self.embed.embedding_dim // 4)
        mask = places[None, :] <= places[:, None]
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin(), mask)
        return self.head(x)


class RotaryLayer(nn.Module):
    def __init__(self, width, heads, written):
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 24), nn.GELU(),
                                 nn.Linear(24, width))  # fmt: skip
        self.heads, self.written = heads, written

    def forward(self, x, cos, sin, mask):
        batch, seq, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, seq, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = (torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
                for a, b in (each.chunk(2, -1) for each in (q, k)))  # fmt: skip
        if self.written:
            hidden = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(x.dtype).min)
            scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + hidden).softmax(-1)
            mixed = scores @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, seq, width))
        return x + self.mlp(x)


@cache
def rotary(written=False, seq=True):
    model = seeded(lambda: Rotary(written=written))
    sizes = SIZES if seq else {"ids": {0: "batch"}}
    return capture(model, (torch.randint(0, 50, (2, 9), generator=generator()),), dynamic=sizes,
                   verify=False)  # fmt: skip


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tokens(batch=3, seq=9, seed=1):
    return torch.randint(0, 50, (batch, seq), generator=generator(seed))


@cache
def pooled(first=True):
    model = seeded(lambda: Transformer(width=8, depth=4, heads=2, first=first))
    return capture(model, token_batches(1)[0], dynamic=SIZES, verify=False)


PROGRAMS = {
    "sdpa mask": lambda: rotary(),
    "written mask": lambda: rotary(True),
    "fixed length": lambda: rotary(False, False),
    "norm first": lambda: pooled(),
    "norm last": lambda: pooled(False),
}


def some(fast, *names):
    """Return test cases by name, all but some of them for `make slow`."""
    return [pytest.param(n, marks=() if n in fast else pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", some(("written mask", "norm last"), *PROGRAMS))
def test_at_capacity_1_nothing_changes_nor_do_gradients(name):
    program = PROGRAMS[name]()
    for inference in ("top_k", "predictor"):
        options = {"capacity": 1.0, "inference": inference, "layers": [0, 1, 3]}
        result = apply(MixtureOfDepths, program, options)
        ids = tokens()
        assert torch.equal(result.program(ids), program(ids))
        grads = []
        for each in (program, result.program):
            each.module.zero_grad()
            each(ids).square().sum().backward()
            grads.append({name: p.grad for name, p in each.module.named_parameters()})
        for name, grad in grads[0].items():
            torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-5)
    assert MixtureOfDepths().promises(MixtureOfDepths.Options(capacity=1.0)) == "exact"
    assert MixtureOfDepths().promises(MixtureOfDepths.Options(capacity=0.5)) == "approximate"


@pytest.mark.parametrize("written", some((True,), False, True))
def test_it_equals_the_formula(written):
    program = rotary(written)
    result = apply(MixtureOfDepths, program, {"capacity": 0.4, "layers": [2],
                                              "inference": "top_k"})  # fmt: skip
    state = dict(result.program.module.named_parameters())
    model = seeded(lambda: Rotary(written=written))
    ids = tokens(seq=11)
    places = torch.arange(11)
    angles = places[:, None] / 10 ** torch.arange(4)
    mask = places[None, :] <= places[:, None]
    x = model.embed(ids)
    for index, layer in enumerate(model.layers):
        if index != 2:
            x = layer(x, angles.cos(), angles.sin(), mask)
            continue
        scores = F.linear(x, state["layers.2.router.weight"])[..., 0]
        rows, weight = [], state["layers.2.router.weight"]
        for row, score in zip(x, scores, strict=True):
            at = score.topk(5).indices.sort().values
            own = angles[at]
            y = layer(row[at][None], own.cos(), own.sin(), mask[at][:, at])[0]
            gate = score[at].sigmoid()[:, None]
            made = y + (gate - gate.detach()) * (y - row[at])
            rows.append(row.index_copy(0, at, made))
        x = torch.stack(rows)
    wanted = model.head(x)
    torch.testing.assert_close(result.program(ids), wanted, rtol=1e-5, atol=1e-5)
    # The router hears of the loss from the first step on.
    (hoped,) = torch.autograd.grad(wanted.square().sum(), weight)
    program = result.program.copy()
    program.module.train()
    weight = dict(program.module.named_parameters())["layers.2.router.weight"]
    (found,) = torch.autograd.grad(program(ids).square().sum(), weight)
    assert found.abs().max() > 1e-3
    torch.testing.assert_close(found, hoped, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", some(("written mask",), "sdpa mask", "written mask", "fixed length")
)
def test_a_causal_model_sees_no_later_token(name):
    result = apply(MixtureOfDepths, PROGRAMS[name](), {"capacity": 0.5})
    assert result.decision.causal
    for cut in (2, 5, 8):
        one, other = tokens(), tokens()
        other[:, cut:] = tokens(seed=7)[:, cut:]
        a, b = result.program(one), result.program(other)
        assert torch.equal(a[:, :cut], b[:, :cut])
        assert not torch.equal(a, b)
    # The choice of the largest, as in training, does see them.
    top = apply(MixtureOfDepths, PROGRAMS[name](), {"capacity": 0.5, "inference": "top_k"})
    one, other = tokens(), tokens()
    other[:, 5:] = tokens(seed=7)[:, 5:]
    assert not torch.equal(top.program(one)[:, :5], top.program(other)[:, :5])


class Gated(nn.Module):
    """Layers of which perceptrons can be routed alone; their mask is a buffer, or an argument."""

    def __init__(self, causal, width=8, depth=2):
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.layers = nn.ModuleList(GatedLayer(width) for _ in range(depth))
        mask = torch.ones(9, 9).tril() if causal else torch.ones(9, 9)
        self.register_buffer("mask", mask.log())

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, self.mask)
        return x


class GatedLayer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv, self.mlp = nn.Linear(width, 3 * width), Perceptron(width)

    def forward(self, x, mask):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.mlp(x + (q @ k.transpose(1, 2) + mask).softmax(-1) @ v)


class Perceptron(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


@pytest.mark.parametrize("causal", [False, True])
def test_a_perceptron_alone_is_causal_where_its_model_is(causal):
    ids = {"ids": {0: "batch"}}
    program = capture(seeded(lambda: Gated(causal)), (tokens(),), dynamic=ids, verify=False)
    options = {"capacity": 0.5, "blocks": ["layers.*.mlp"], "layers": [0, 1]}
    result = apply(MixtureOfDepths, program, options)
    assert result.decision.causal is causal
    one, other = tokens(), tokens()
    other[:, 6:] = tokens(seed=7)[:, 6:]
    assert torch.equal(result.program(one)[:, :6], result.program(other)[:, :6]) is causal


def test_models_without_an_order_go_by_their_routers():
    assert not apply(MixtureOfDepths, pooled(), {"capacity": 0.5}).decision.causal


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 17), st.floats(0.05, 1.0), st.integers(0, 99))
def test_tokens_are_chosen_by_score_or_one_after_the_other(count, capacity, seed):
    scores = torch.randn(3, count, generator=generator(seed))
    top = TopTokens(capacity, causal=True)
    k = top.count(count)
    assert capacity * count - 0.02 <= k < capacity * count + 1.02
    places = top.train()(scores, -scores)
    assert places.shape == (3, k)
    assert torch.equal(places, places.sort(1).values)
    kept = scores.gather(1, places)
    assert torch.equal(kept.sort(1, descending=True).values, scores.topk(k, 1).values)
    for row, at in zip(scores, top.eval()(-scores, scores), strict=True):
        wanted: list[int] = []
        for i in range(count):
            needed = count - i == k - len(wanted)
            if len(wanted) < k and (row[i] > 0 or needed):
                wanted.append(i)
        assert at.tolist() == wanted
        assert len(wanted) == k


def test_capacity_falls_over_a_training_and_is_final_in_evaluation():
    top = TopTokens(0.25, start=1.0, until=0.5)
    sizes = []
    for top.progress in (0.0, 0.25, 0.5, 1.0):
        sizes.append(top.train().count(16))
    assert sizes == [16, 10, 4, 4]
    top.progress = 0.0
    assert top.eval().count(16) == 4
    result = apply(MixtureOfDepths, rotary(), {"capacity": 0.25, "start": 1.0})
    copy = result.program.copy()
    copy.module.train()
    routed = [m for m in copy.module.modules() if isinstance(m, TopTokens)]
    for each in routed:
        each.progress = 0.0
    assert torch.equal(copy(tokens()), rotary()(tokens()))
    fixed = apply(MixtureOfDepths, rotary(False, False), {"capacity": 0.25, "start": 1.0})
    copy = fixed.program.copy()
    copy.module.train()
    for each in (m for m in copy.module.modules() if isinstance(m, TopTokens)):
        each.progress = 0.0
    assert torch.equal(copy(tokens()), rotary()(tokens()))


def test_predictors_learn_the_final_choice_while_more_tokens_go_through():
    options = {"capacity": 0.25, "start": 1.0, "layers": [1]}
    program = apply(MixtureOfDepths, rotary(), options).program.copy()
    seen = []
    for module in program.module.modules():
        if isinstance(module, Tap):
            module.register_forward_hook(lambda _, args, __: seen.append(args[0]))
        if isinstance(module, TopTokens):
            module.progress = 0.0
    program.module.train()
    program(tokens())
    ((_, chosen),) = (each.unbind(-1) for each in seen)
    assert chosen.sum(1).tolist() == [3, 3, 3]


def test_the_loss_teaches_the_predictor_alone():
    result = apply(MixtureOfDepths, rotary(), {"capacity": 0.5})
    program = result.program.copy()
    program.module.train()
    joint = join(program, None, make_terms((Routing(use="routing"),)))
    total, count = joint((tokens(),), None, 0.0).totals["routing"]
    names, tensors = zip(*joint.module.named_parameters(), strict=True)
    grads = torch.autograd.grad(total / count, tensors, allow_unused=True)
    trained = {name for name, grad in zip(names, grads, strict=True) if grad is not None}
    assert trained == {f"layers.{i}.predictor.{w}" for i in (1, 3) for w in ("weight", "bias")}
    x = torch.tensor([[[2.0, 1.0], [-1.0, 0.0], [0.5, 0.0]]])
    loss, count = make_terms((Routing(use="routing"),))[0].total(
        Outcome(None, None, (), None, raw_taps={"route_1": x}), 0.0
    )
    wanted = -(F.logsigmoid(torch.tensor([2.0, 1.0, -0.5]))).sum()
    torch.testing.assert_close(loss, wanted)
    with pytest.raises(UsageError, match="the loss routing has no predictor to train"):
        make_terms((Routing(use="routing"),))[0].total(Outcome(None, None, (), None), 0.0)


def test_fitted_routers_rank_tokens_by_how_far_the_block_moves_them():
    data = [(tokens(8, 9, seed),) for seed in range(4)]
    context = Context(data={"calibration": data})
    options = {"capacity": 0.5, "layers": [1], "init": "influence", "calibration": 32}
    result = apply(MixtureOfDepths, rotary(), options, context)
    model = seeded(lambda: Rotary())
    seen = []
    model.layers[1].register_forward_hook(lambda _, a, out: seen.append((a[0], out)))
    with torch.no_grad():
        for (ids,) in data:
            model(ids)
    x, y = (torch.cat(each).flatten(0, 1) for each in zip(*seen, strict=True))
    moved = ((y - x).norm(dim=1) / x.norm(dim=1)).log()
    scores = x @ result.decision.arrays["layers.1.weight"][0]
    assert torch.corrcoef(torch.stack([scores, moved]))[0, 1] > 0.5
    assert scores.std() == pytest.approx(1.0, abs=1e-3)
    bias = dict(result.program.module.named_parameters())["layers.1.predictor.bias"]
    assert (scores + bias > 0).float().mean() == pytest.approx(0.5, abs=0.02)
    planned = MixtureOfDepths().decide(
        rotary(), MixtureOfDepths.Options(capacity=0.5, init="influence"), Context(planning=True)
    )
    assert planned.pending == ("2 routers: known after measuring the blocks",)


@pytest.mark.slow
def test_it_exports_with_a_dynamic_number_of_tokens():
    program = apply(MixtureOfDepths, rotary(), {"capacity": 0.3}).program  # k = 3 of 9
    plain = plain_program(program)
    example = probes(program, None, 0, program.dims)[0]
    module = export_program(plain, program.dims, example).program.module()
    for shape in ((1, 4), (2, 13)):
        ids = tokens(*shape)
        torch.testing.assert_close(module(ids), program(ids))


@pytest.mark.parametrize("start", [None, 1.0])
def test_what_is_emitted_holds_one_scorer_a_block(start):
    options = {"capacity": 0.5, "layers": [2], "start": start}
    for program, kept in ((rotary(), "predictor"), (pooled(), "router")):
        made = apply(MixtureOfDepths, program, options).program
        emitted = as_emitted(made)
        found = [str(node.target) for node in emitted.nodes if "layers.2.rou" in str(node.target)
                 or "layers.2.pred" in str(node.target)]  # fmt: skip
        assert found == [f"layers.2.{kept}"]
        assert torch.equal(emitted(tokens()), made(tokens()))


def test_blocks_that_have_no_tokens_say_so():
    program = captured(ResNet, 2, 3, 16, 16)
    with pytest.raises(UsageError) as caught:
        apply(MixtureOfDepths, program, {"capacity": 0.5, "layers": [1]})
    assert caught.value.what == "block 1 cannot be routed"
    assert caught.value.reason == "its state is no [batch, tokens, width]"
    with pytest.raises(UsageError, match="there is no block 9"):
        apply(MixtureOfDepths, program, {"capacity": 0.5, "layers": [9]})
    with pytest.raises(UsageError) as caught:
        apply(MixtureOfDepths, program, {"capacity": 0.5, "layers": [2]})
    assert caught.value.reason == (
        "its output f32[batch,16,4,4] differs from its input f32[batch,8,8,8]"
    )


def test_a_block_is_routed_once():
    done = apply(MixtureOfDepths, rotary(), {"capacity": 0.5}).program
    with pytest.raises(UsageError) as caught:
        apply(MixtureOfDepths, done, {"capacity": 0.5, "blocks": ["layers.*"]})
    assert caught.value.what == "no block can be routed"
    assert "layers.1" in caught.value.reason


def test_a_number_of_tokens_that_is_a_width_too_is_refused():
    model = seeded(lambda: Rotary(width=16))
    program = capture(model, (tokens(2, 16),), dynamic={"ids": {0: "batch"}}, verify=False)
    with pytest.raises(UsageError) as caught:
        apply(MixtureOfDepths, program, {"capacity": 0.5, "layers": [1]})
    assert caught.value.reason.startswith("16 is its number of tokens and one of its widths")


def test_it_plans_from_meta_weights():
    with torch.device("meta"):
        model = Transformer(width=64, depth=6)
    program = capture(model, token_batches(1)[0], dynamic=SIZES)
    result = apply(MixtureOfDepths, program, {"capacity": 0.125})
    assert [each.index for each in result.decision.blocks] == [1, 3, 5]


@pytest.mark.golden("passes/depth/mixture_of_depths")
def test_golden(golden_graph):
    program = capture(Transformer(width=8, depth=2, heads=2).eval(), token_batches(1)[0],
                      dynamic=SIZES)  # fmt: skip
    golden_graph(hash_weights_(apply(MixtureOfDepths, program, {"capacity": 0.5}).program))
