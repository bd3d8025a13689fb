import json
from functools import cache

import pytest
import torch
from torch import nn

from fxcompress.errors import DataError, NumericsError, SelectorError, UsageError
from fxcompress.ir import capture
from fxcompress.pipeline.context import Context
from passes.depth.skip_blocks import SkipBlocks
from tests.passes.models import ResNet, Transformer, image_batches, token_batches
from tests.passes.support import apply, captured, random_input, seeded


@cache
def program_of(seed, first):
    model = seeded(lambda: Transformer(first=first), seed)
    return capture(model, token_batches(1)[0], dynamic={"ids": {0: "batch", 1: "seq"}})


def transformer(seed=0, *, first=True):
    """Return a model, and the Program of one like it."""
    return seeded(lambda: Transformer(first=first), seed), program_of(seed, first)


def without(model, removed):
    kept = [layer for index, layer in enumerate(model.layers) if index not in removed]
    model.layers = nn.ModuleList(kept)
    return model


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("first", [True, False], ids=["norm first", "norm last"])
@pytest.mark.parametrize("removed", [(0,), (3,), (1, 2), (0, 2, 3)])
def test_equals_the_model_built_without_the_layers(seed, first, removed):
    model, program = transformer(seed, first=first)
    result = apply(SkipBlocks, program, {"layers": list(removed)})
    ids = token_batches(1, batch=3, seq=9, seed=seed + 1)[0][0]
    assert torch.equal(result.program(ids), without(model, removed)(ids))


def test_what_is_removed_is_recorded_and_names_stay():
    model, program = transformer()
    result = apply(SkipBlocks, program, {"layers": [1]})
    gone = {e.name for e in result.edits if e.kind == "remove-tensor"}
    assert gone == {name for name in model.state_dict() if name.startswith("layers.1.")}
    assert set(result.program.state()) == set(model.state_dict()) - gone
    nodes = {e.node for e in result.edits if e.kind == "remove-node"}
    assert all(node.startswith("layers.1") for node in nodes)
    changed = [e.node for e in result.edits if e.kind == "change-node"]
    assert set(changed) == {"layers.2.norm1", "layers.2/add"}


def test_block_influence_is_one_minus_the_cosine():
    model, program = transformer()
    data = token_batches(2)
    result = apply(SkipBlocks, program, {"count": 1, "calibration": 8},
                   Context(data={"calibration": data}))  # fmt: skip
    states = {index: [] for index in range(4)}
    for index, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda _, args, out, i=index: states[i].append((args[0], out)))
    with torch.no_grad():
        for (ids,) in data:
            model(ids)
    for block in result.decision.blocks:
        cosines = [torch.cosine_similarity(a, b, dim=-1) for a, b in states[block.index]]
        assert block.score == pytest.approx(1 - torch.cat(cosines).mean().item(), abs=1e-6)
    least = min(result.decision.blocks, key=lambda block: block.score)
    assert [block.index for block in result.decision.blocks if block.skip] == [least.index]


def test_padding_does_not_count():
    model = seeded(Transformer)
    data = token_batches(2, masked=True)
    program = capture(model, (), data[0], dynamic={
        "ids": {0: "batch", 1: "seq"}, "attention_mask": {0: "batch", 1: "seq"},
    })  # fmt: skip

    def influences(batches):
        context = Context(data={"calibration": batches})
        return [b.score for b in apply(SkipBlocks, program, {"count": 1, "calibration": 8},
                                           context).decision.blocks]  # fmt: skip

    other = [
        {"ids": b["ids"] * b["attention_mask"], "attention_mask": b["attention_mask"]} for b in data
    ]
    assert influences(other) == pytest.approx(influences(data), abs=1e-6)
    full = [{**b, "attention_mask": torch.ones_like(b["ids"])} for b in data]
    assert influences(full) != pytest.approx(influences(data), abs=1e-6)


def test_a_block_that_does_nothing_goes_first():
    model = seeded(Transformer)
    with torch.no_grad():
        for linear in (model.layers[2].out, model.layers[2].down):
            linear.weight.zero_()
            linear.bias.zero_()
    program = capture(model, token_batches(1)[0])
    context = Context(data={"calibration": token_batches(2)})
    result = apply(SkipBlocks, program, {"ratio": 0.25, "calibration": 8}, context)
    assert [block.index for block in result.decision.blocks if block.skip] == [2]
    ids = token_batches(1, seed=5)[0][0]
    assert torch.allclose(result.program(ids), program(ids), atol=1e-6)


def test_resnet_blocks_that_change_the_type_say_so():
    program = captured(ResNet, 2, 3, 16, 16)
    context = Context(data={"calibration": image_batches(2)})
    result = apply(SkipBlocks, program, {"count": 2, "calibration": 8}, context)
    assert [block.path for block in result.decision.blocks] == ["layer1.0", "layer1.1", "layer2.1"]
    assert result.reasons() == {
        "layer2.0": "its output f32[batch,16,4,4] differs from its input f32[batch,8,8,8]"
    }
    assert result.program(random_input(3, 3, 16, 16)).shape == (3, 10)


class SharedBias(nn.Module):
    """The first layer makes something that the second reads, as T5's position bias."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, bias=None):
            bias = self.linear(x).tanh() if bias is None else bias
            return x + self.linear(x) * bias, bias

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(self.Layer() for _ in range(3))

    def forward(self, x):
        bias = None
        for layer in self.layers:
            x, bias = layer(x, bias)
        return x


class Plain(nn.Module):
    """Repeated layers of one type, none of them residual."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_side_outputs_that_others_read_are_refused():
    program = captured(SharedBias, 2, 4)
    result = apply(SkipBlocks, program, {"layers": [1]})
    assert result.reasons()["layers.0"].startswith("something else reads what it computes inside")
    with pytest.raises(UsageError, match="block 0 cannot be skipped"):
        apply(SkipBlocks, program, {"layers": [0]})


class BorrowedSize(nn.Module):
    """A later layer uses a size that the first one read off a tensor of its own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(self.Layer() for _ in range(3))

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, size=None):
            y = self.linear(x)
            if size is None:
                size = (torch.cat([y, y, y[:1]]).shape[0] - 1) // 2
            return x + y * torch.ones(size, 1), size

    def forward(self, x):
        size = None
        for layer in self.layers:
            x, size = layer(x, size)
        return x


def test_sizes_read_off_a_skipped_block_are_read_off_its_input():
    program = captured(BorrowedSize, 2, 4)
    result = apply(SkipBlocks, program, {"layers": [0, 1]})
    assert result.declined == ()
    assert not any("layers.0" in name or "layers.1" in name for name in result.program.state())
    x = random_input(5, 4)
    assert torch.equal(result.program(x), x + program.module.get_submodule("layers.2.linear")(x))


class InnerOutput(nn.Module):
    """What the second layer computes inside is an output of the model."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            inner = self.linear(x)
            return x + inner.tanh(), inner

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(self.Layer() for _ in range(3))

    def forward(self, x):
        inner = []
        for layer in self.layers:
            x, each = layer(x)
            inner.append(each)
        return x, inner[1]


def test_what_is_an_output_of_the_model_is_not_skipped():
    program = captured(InnerOutput, 2, 4)
    result = apply(SkipBlocks, program, {"layers": [2]})
    assert result.reasons() == {
        "layers.1": "something else reads what it computes inside: output reads layers.1.linear"
    }


def test_blocks_that_are_not_residual_are_refused():
    program = captured(Plain, 2, 4)
    with pytest.raises(SelectorError, match="no repeated residual blocks"):
        apply(SkipBlocks, program, {"layers": [0]})
    with pytest.raises(UsageError) as caught:
        apply(SkipBlocks, program, {"blocks": ["layers.*"], "layers": [0]})
    assert "does not add to what it reads" in caught.value.reason


def test_globs_choose_the_outermost_modules():
    _, program = transformer()
    result = apply(SkipBlocks, program, {"blocks": ["layers.[13]*"], "layers": [1]})
    assert [block.path for block in result.decision.blocks] == ["layers.1", "layers.3"]
    assert [block.path for block in result.decision.blocks if block.skip] == ["layers.3"]


def test_a_plan_shows_how_many_and_says_that_which_is_pending():
    _, program = transformer()
    result = apply(SkipBlocks, program, {"count": 2}, Context(planning=True))
    assert result.decision.pending == ("which 2 blocks: known after measuring block influence",)
    assert sum(block.skip for block in result.decision.blocks) == 2
    assert not any("layers.3" in name for name in result.program.state())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": [4]}, UsageError, "there is no block 4"),
        ({"count": 5, "calibration": 4}, UsageError, "5 blocks are to be skipped, and 4 can be"),
        ({"ratio": 0.1, "calibration": 4}, UsageError, "skips none of 4 blocks"),
        ({"blocks": ["block.*"], "count": 1}, SelectorError, "matches no module"),
        ({"count": 1, "calibration": 999}, DataError, "holds 16 samples, and 999 are asked for"),
    ],
)
def test_what_cannot_be_done_is_an_error(options, error, message):
    _, program = transformer()
    with pytest.raises(error, match=message):
        apply(SkipBlocks, program, options, Context(data={"calibration": token_batches(4)}))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"count": 1, "ratio": 0.5},
        {"layers": [1, 1]},
        {"layers": [-1]},
        {"count": 0},
        {"ratio": 1.0},
        {"count": 1, "criterion": "magnitude"},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match="validation error"):
        SkipBlocks.Options.model_validate_json(json.dumps(options))


def test_a_nan_is_named():
    model = seeded(Transformer)
    with torch.no_grad():
        model.layers[1].down.bias.fill_(float("nan"))
    program = capture(model, token_batches(1)[0])
    with pytest.raises(NumericsError, match=r"hidden state of layers\.1"):
        apply(SkipBlocks, program, {"count": 1, "calibration": 4},
              Context(data={"calibration": token_batches(1)}))  # fmt: skip
