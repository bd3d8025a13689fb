import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxcompress.errors import NumericsError, SelectorError, UsageError
from fxcompress.ir import capture
from fxcompress.ir.naming import node_ids
from fxcompress.pipeline.context import Context
from passes.quantize.static import Static
from passes.tidy.cast import Cast
from passes.tidy.fold_batchnorm import FoldBatchNorm
from tests.passes.models import ResNet, Transformer, image_batches, token_batches
from tests.passes.support import (
    apply,
    captured,
    random_input,
    relative_error,
    seeded,
    sqnr,
    text_of,
)

TOLERANCE = {"float16": 2e-3, "bfloat16": 2e-2}


def dtypes(program):
    return {name: node.meta["val"].dtype for node, name in node_ids(program).items()
            if isinstance(node.meta["val"], torch.Tensor)}  # fmt: skip


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6)

    def forward(self, x):
        return F.softmax(self.down(self.norm(self.up(x)).relu()), -1) + 1


def test_casts_stand_at_the_boundaries_only():
    result = apply(Cast, captured(Mixed, 2, 6), {"dtype": "float16"})
    assert text_of(result.program) == [
        "x = input()",
        "/to = to(x)",
        "up = linear(/to)",
        "/to@2 = to(up)",
        "norm = layer_norm(/to@2)",
        "/relu = relu(norm)",
        "/to@3 = to(/relu)",
        "down = linear(/to@3)",
        "/to@4 = to(down)",
        "/softmax = softmax(/to@4)",
        "/add = add(/softmax)",
        "output = output(/add)",
    ]
    kinds = dtypes(result.program)
    assert kinds["up"] == kinds["down"] == torch.float16
    assert kinds["norm"] == kinds["/relu"] == kinds["/add"] == torch.float32
    changed = [edit.name for edit in result.edits if edit.kind == "set-tensor"]
    assert changed == ["down.bias", "down.weight", "up.bias", "up.weight"]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_resnet_stays_close_at_half_the_size(dtype, seed):
    program = apply(FoldBatchNorm, captured(ResNet, 2, 3, 16, 16, seed=seed)).program
    result = apply(Cast, program, {"dtype": dtype})
    assert {t.dtype for t in result.program.state().values()} == {getattr(torch, dtype)}
    # One cast of the input, one of the output.
    assert result.ops().count("to") == 2
    assert relative_error(program, result.program, random_input(5, 3, 16, 16)) < TOLERANCE[dtype]


@pytest.mark.parametrize("first", [True, False], ids=["norm first", "norm last"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_transformer_keeps_its_norms(dtype, first):
    program = capture(seeded(lambda: Transformer(first=first)), token_batches(1)[0],
                      dynamic={"ids": {0: "batch", 1: "seq"}})  # fmt: skip
    result = apply(Cast, program, {"dtype": dtype})
    half = getattr(torch, dtype)
    for name, tensor in result.program.state().items():
        assert tensor.dtype == (torch.float32 if "norm" in name else half), name
    kinds = dtypes(result.program)
    assert kinds["layers.0.norm1"] == torch.float32
    assert kinds["layers.0/sdpa"] == half
    ids = token_batches(1, batch=3, seq=9, seed=4)[0][0]
    assert relative_error(program, result.program, ids) < TOLERANCE[dtype]


def test_a_shared_cast_is_made_once_and_none_undoes_another():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.a(x) @ self.b(x).transpose(0, 1)
            return self.c(torch.exp(y)[:, :1].expand(-1, 4) + x), y

    program = capture(seeded(Model), (random_input(4, 4),), dynamic=None)
    result = apply(Cast, program, {"dtype": "bfloat16"})
    lines = text_of(result.program)
    reads = [line.partition("(")[2] for line in lines if " = to(" in line]
    assert len(reads) == len(set(reads))
    assert "a = linear(/to)" in lines
    assert "b = linear(/to)" in lines
    with torch.no_grad():
        assert [each.dtype for each in result.program(random_input(4, 4))] == [torch.float32] * 2


def test_a_weight_that_overflows_keeps_its_layer_in_float32():
    def build():
        model = Mixed()
        with torch.no_grad():
            model.up.weight[0, 0] = 7e4
        return model

    program = captured(build, 2, 6)
    result = apply(Cast, program, {"dtype": "float16"})
    assert result.reasons() == {"up": "up.weight reaches 7e+04, and float16 ends at 65504"}
    assert result.program.state()["up.weight"].dtype == torch.float32
    assert apply(Cast, program, {"dtype": "bfloat16"}).reasons() == {}


def test_activations_that_overflow_are_found_by_calibration():
    class Loud(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(self.a(x * 100) * 10000 / 1e6)

    program = captured(Loud, 2, 4)
    x = random_input(8, 4)
    plain = apply(Cast, program, {"dtype": "float16"})
    assert not torch.isfinite(plain.program(x)).all()
    context = Context(data={"calibration": [(x,)]})
    measured = apply(Cast, program, {"dtype": "float16", "calibration": 8}, context)
    assert "/mul@2" in measured.reasons()
    assert "float16 ends at 65504" in measured.reasons()["/mul@2"]
    assert relative_error(program, measured.program, x) < 2e-3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_fully_masked_rows_do_not_become_nan(dtype):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x, keep):
            q, k, v = self.qkv(x).chunk(3, -1)
            bias = (1 - keep[:, None, :]) * torch.finfo(torch.float32).min
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    x, keep = random_input(2, 5, 8), torch.ones(2, 5)
    keep[0] = 0
    program = capture(seeded(Masked), (x, keep))
    result = apply(Cast, program, {"dtype": dtype})
    with torch.no_grad():
        wanted, got = program(x, keep), result.program(x, keep)
    assert torch.isfinite(got).all()
    assert torch.allclose(got[1], wanted[1], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_literal_beyond_the_range_stays_in_float32(dtype):
    class Filled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            scores = self.linear(x).masked_fill(x > 0, torch.finfo(torch.float32).min)
            return F.softmax(scores, -1)

    program = captured(Filled, 2, 4)
    result = apply(Cast, program, {"dtype": dtype})
    x = -random_input(5, 4).abs()
    x[:, 0] = 1
    assert relative_error(program, result.program, x) < TOLERANCE[dtype]


def test_tied_weights_are_cast_together_or_not_at_all():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    program = capture(seeded(Tied), token_batches(1)[0])
    both = apply(Cast, program, {"dtype": "bfloat16"}).program.state()
    assert both["embed.weight"] is both["head.weight"]
    assert both["head.weight"].dtype == torch.bfloat16
    one = apply(Cast, program, {"dtype": "bfloat16", "targets": ["head"]})
    assert "is shared with embed, which stays" in one.reasons()["head"]
    assert one.program.state()["head.weight"].dtype == torch.float32


def test_free_parameters_follow_what_reads_them():
    class Free(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.place = nn.Linear(4, 8), nn.Parameter(torch.randn(1, 3, 8))
            self.gain, self.first = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(1, 1, 8))

        def forward(self, x):
            y = self.proj(x)
            y = torch.cat([self.first.expand(y.shape[0], -1, -1), y], 1) + self.place
            return F.softmax(y, -1) * self.gain

    program = captured(Free, 2, 2, 4)
    state = apply(Cast, program, {"dtype": "bfloat16"}).program.state()
    assert state["place"].dtype == state["first"].dtype == torch.bfloat16
    assert state["gain"].dtype == torch.float32


def test_selection():
    program = captured(Mixed, 2, 6)
    result = apply(Cast, program, {"dtype": "float16", "exclude": ["up"]})
    assert result.reasons() == {}
    assert dtypes(result.program)["up"] == torch.float32
    everything = apply(Cast, program, {"dtype": "float16", "keep": []})
    assert dtypes(everything.program)["norm"] == torch.float16


def test_quantised_layers_stay():
    program = apply(FoldBatchNorm, captured(ResNet, 2, 3, 16, 16)).program
    options = {"types": ["conv2d"], "calibration": 16}
    data = Context(data={"calibration": image_batches()})
    int8 = apply(Static, program, options, data).program
    result = apply(Cast, int8, {"dtype": "float16"})
    assert result.reasons()["stem.0"] == "it is quantised"
    state = result.program.state()
    assert state["stem.0.weight"].dtype == torch.float32
    assert state["head.weight"].dtype == torch.float16
    assert sqnr(int8, result.program, random_input(4, 3, 16, 16)) > 50


def test_is_idempotent():
    once = apply(Cast, captured(Mixed, 2, 6), {"dtype": "float16"}).program
    with pytest.raises(SelectorError, match="nothing is selected"):
        apply(Cast, once, {"dtype": "float16"})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "float16", "keep": ["sofmax"]}, UsageError, "no op sofmax"),
        ({"dtype": "float16", "targets": ["norm"]}, SelectorError, "matches nothing"),
        ({"dtype": "float16", "expect": 3}, SelectorError, "2 nodes are selected"),
    ],
)
def test_what_cannot_be_done_is_an_error(options, error, message):
    with pytest.raises(error, match=message):
        apply(Cast, captured(Mixed, 2, 6), options)


@pytest.mark.parametrize("options", [{}, {"dtype": "float8"}, {"dtype": "float16", "bits": 16}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match="validation error"):
        Cast.Options.model_validate_json(json.dumps(options))


def test_a_nan_in_a_weight_is_named():
    def build():
        model = Mixed()
        with torch.no_grad():
            model.down.weight[0, 0] = float("nan")
        return model

    with pytest.raises(NumericsError, match=r"in down\.weight"):
        apply(Cast, captured(build, 2, 6), {"dtype": "bfloat16"})


def test_plans_on_meta_weights():
    with torch.device("meta"):
        model = Mixed().eval()
    program = capture(model, (torch.empty(2, 6, device="meta"),))
    result = apply(Cast, program, {"dtype": "float16"}, Context(planning=True))
    assert result.program.state()["up.weight"].dtype == torch.float16
