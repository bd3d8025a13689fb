"""Samples leave a batch one by one: the same answers as alone, and what keeps them together."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxcompress.emit import EmitOptions, eager_module, emit
from fxcompress.errors import UsageError
from fxcompress.ir import capture
from fxcompress.ir.ops import module_of
from fxcompress.nn.exits import uncertainty
from fxcompress.rewrite import at_exit, early_exits
from fxcompress.rewrite.later import later_of, sample_dims
from passes.depth.early_exit import EarlyExit
from passes.depth.exit_when import ExitWhen
from tests.passes.models import ResNet, Transformer, token_batches
from tests.passes.support import apply, seeded

ROWS = 12


class Conditioned(nn.Module):
    """Reads several inputs, and holds samples in the second dimension of its states.

    `pick` says at which place each sample answers; the numbers of the samples are made of a size.
    """

    def __init__(self, width=8, depth=3):
        super().__init__()
        self.embed = nn.Linear(5, width)
        self.table = nn.Parameter(torch.randn(6, 1, width))
        self.layers = nn.ModuleList(Mixed(width) for _ in range(depth))
        self.head = nn.Linear(width, 4)

    def forward(self, x, condition, pick):
        states = self.embed(x).transpose(0, 1)
        scale = condition.sigmoid()
        for layer in self.layers:
            states = layer(states, scale, self.table)
        return self.head(states[pick, torch.arange(x.shape[0], device=x.device)])


class Mixed(nn.Module):
    """Adds to states `[tokens, batch, width]` what depends on a sample and on a place."""

    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, states, scale, table):
        tokens, batch, width = states.shape
        flat = (states * scale + table).reshape(tokens * batch, -1)
        return states + self.down(torch.relu(self.up(flat))).reshape(tokens, batch, width)


class Norms(nn.Module):
    """Residual layers around something that may read the whole batch."""

    def __init__(self, inner):
        super().__init__()
        self.layers = nn.ModuleList(Around(inner) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.linear = inner(), nn.Linear(6, 6)

    def forward(self, x):
        return x + self.linear(self.inner(x))


class Centered(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Shares(nn.Module):
    def forward(self, x):
        return x.softmax(0)


class Alike(nn.Module):
    def forward(self, x):
        return (x @ x.T).softmax(-1) @ x


def masked():
    batches = token_batches(1, batch=ROWS, seq=7, seed=3, masked=True)[0]
    return (), dict(batches), {name: {0: "batch", 1: "seq"} for name in batches}


def drawn(*shapes):
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def conditioned():
    pick = torch.arange(ROWS) % 6
    return (*drawn((ROWS, 6, 5), (ROWS, 8)), pick), {}, None


MODELS = {
    "conditioned": (Conditioned, conditioned, "copy"),
    "masked": (lambda: Transformer(width=16, heads=2), masked, "copy"),
    "masked, norm last": (lambda: Transformer(width=16, heads=2, first=False), masked, "shared"),
    "resnet": (ResNet, lambda: (drawn((ROWS, 3, 16, 16)), {}, None), "linear"),
}
FAST = ("conditioned", "masked")


@cache
def program_of(name, seed=0):
    """Return a model with two exits whose answers are random, and the thresholds that halve them.

    No sample is near a threshold: which exit it takes is no question of rounding.
    """
    build, inputs, head = MODELS[name]
    args, kwargs, dynamic = inputs()
    dynamic = dynamic or {0: {0: "batch"}, 1: {0: "batch"}, 2: {0: "batch"}}
    given = {"dynamic": dynamic} if kwargs else {}
    program = capture(seeded(build, seed), args, kwargs, verify=False, **given)
    exits = apply(EarlyExit, program, {"after": [0, 1], "head": head}).program
    generator = torch.Generator().manual_seed(seed)
    for path, tensor in exits.module.named_parameters():
        if path.startswith("exits.") and path.endswith(("fc.weight", "head.weight")):
            tensor.data.normal_(generator=generator)
    return exits, args, kwargs


@torch.no_grad()
def halves(exits, args, kwargs):
    found = []
    for each in early_exits(exits):
        unsure = uncertainty(at_exit(exits, each.name)(*args, **kwargs), "entropy").sort().values
        middle = int((unsure[3:8] - unsure[2:7]).argmax()) + 3
        found.append(float(unsure[middle - 1 : middle + 1].mean()))
    return found


def rows_of(leaves, index):
    return tuple(each[index] for each in leaves)


def called(module, args, kwargs, index):
    taken = {name: value[index] for name, value in kwargs.items()}
    return module(*rows_of(args, index), **taken)


CASES = [
    pytest.param(name, seed, marks=() if name in FAST and not seed else pytest.mark.slow)
    for name in MODELS
    for seed in range(3)
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "seed"), CASES)
def test_a_batch_answers_as_its_samples_do_alone(name, seed):
    exits, args, kwargs = program_of(name, seed)
    thresholds = halves(exits, args, kwargs)
    result = apply(ExitWhen, exits, {"thresholds": thresholds}).program
    assert all(module_of(each.choice).batch == "each" for each in early_exits(result))
    module = eager_module(result)
    whole = called(module, args, kwargs, slice(None))
    alone = torch.cat([called(module, args, kwargs, [i]) for i in range(ROWS)])
    torch.testing.assert_close(whole, alone, rtol=1e-5, atol=1e-6)
    answers = [at_exit(exits, e)(*args, **kwargs) for e in ("exit_0", "exit_1", "last")]
    taken = [min(range(3), key=lambda e: float((answers[e][i] - alone[i]).abs().sum()))
             for i in range(ROWS)]  # fmt: skip
    wanted = [next((e for e in (0, 1) if uncertainty(answers[e][[i]], "entropy") < thresholds[e]),
                   2) for i in range(ROWS)]  # fmt: skip
    assert taken == wanted
    assert len(set(taken)) > 1


@torch.no_grad()
@settings(max_examples=20, deadline=None)
@given(
    index=st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=9),
    kinds=st.tuples(*[st.sampled_from(["all", "none", "some"])] * 2),
    batch=st.sampled_from(["each", "together"]),
)
def test_any_batch_with_any_thresholds(index, kinds, batch):
    module, program, args, kwargs = decided(kinds, batch)
    got = called(module, args, kwargs, index)
    wanted = called(program, args, kwargs, index)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@cache
def decided(kinds, batch):
    exits, args, kwargs = program_of("conditioned")
    some = halves(exits, args, kwargs)
    thresholds = [{"all": 2.0, "none": 0.0, "some": each}[kind]
                  for kind, each in zip(kinds, some, strict=True)]  # fmt: skip
    result = apply(ExitWhen, exits, {"thresholds": thresholds, "batch": batch}).program
    return eager_module(result), result, args, kwargs


def test_what_holds_samples_is_gathered_where_it_holds_them():
    exits, *_ = program_of("conditioned")
    result = apply(ExitWhen, exits, {"thresholds": [0.5, 0.5]}).program
    first = later_of(early_exits(result)[0].choice)
    found = dict(zip(map(str, first.operands), sample_dims(first), strict=True))
    # States in their second dimension, scales and picks in their first; no numbers of samples.
    assert sorted(found.values()) == [0, 0, 1]
    assert "arange" not in found


@pytest.mark.parametrize(
    ("inner", "reason", "where"),
    [
        (Centered, "it is computed from all samples of a batch at once", "layers.1.inner/mean"),
        (Alike, "it compares samples of a batch with each other", "layers.1.inner/matmul"),
        (Shares, "what it computes of a sample depends on the rest of the batch",
         "layers.1.inner/softmax"),
        (lambda: nn.BatchNorm1d(6, track_running_stats=False),
         "it normalises by the mean and the variance of the batch", "layers.1.inner"),
    ],
)  # fmt: skip
def test_samples_that_read_each_other_stay_together(inner, reason, where):
    exits = pooled(inner)
    with pytest.raises(UsageError) as caught:
        apply(ExitWhen, exits, {"thresholds": [0.5]})
    assert caught.value.what == "samples cannot leave the batch one by one at exit_0"
    assert (caught.value.reason, caught.value.where) == (reason, where)
    assert caught.value.hint == "use `batch: together`"
    result = apply(ExitWhen, exits, {"thresholds": [0.5], "batch": "together"})
    assert result.decision.batch == "together"


def pooled(inner, **kwargs):
    model = seeded(lambda: Norms(inner))
    program = capture(model, drawn((4, 6)), verify=False, **kwargs)
    return apply(EarlyExit, program, {"after": [0], "blocks": ["layers.*"]}).program


def test_a_fixed_batch_is_refused_and_a_single_sample_stops_in_any_case():
    fixed = pooled(nn.Identity, static=("batch",))
    with pytest.raises(UsageError) as caught:
        apply(ExitWhen, fixed, {"thresholds": [0.5]})
    assert caught.value.reason == "the size of the batch is no free number but 4"
    model = seeded(lambda: Norms(nn.Identity))
    one = capture(model, drawn((1, 6)), static=("batch",), verify=False)
    exits = apply(EarlyExit, one, {"after": [0], "blocks": ["layers.*"]}).program
    assert apply(ExitWhen, exits, {"thresholds": [0.5]}).decision.batch == "together"


def test_a_plan_of_meta_weights_checks_types_alone():
    with torch.device("meta"):
        model = Transformer(width=16, depth=2, heads=2)
    program = capture(model, token_batches(1)[0], dynamic={"ids": {0: "batch", 1: "seq"}})
    exits = apply(EarlyExit, program, {"count": 1}).program
    assert apply(ExitWhen, exits, {"thresholds": [0.5]}).decision.batch == "each"


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_format_gives_the_same_answers(name, tmp_path):
    exits, args, kwargs = program_of(name)
    result = apply(ExitWhen, exits, {"thresholds": halves(exits, args, kwargs)}).program
    made = emit(result, tmp_path, ["pt2", "onnx", "python"], example_inputs=kwargs or args,
                options=EmitOptions())  # fmt: skip
    for each in made:
        assert "runs on the samples that go on" in " ".join(each.notes)
        assert each.comparison.relative < 1e-5
