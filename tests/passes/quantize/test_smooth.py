"""`quantize.smooth`: exact, and worth it where channels have outliers."""

import pytest
import torch
from torch import nn

from fxcompress.errors import DataError, NumericsError, SelectorError, UsageError
from fxcompress.ir import capture
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import op_name
from fxcompress.pipeline.context import Context
from fxcompress.testing import check_pass
from passes.quantize.smooth import Smooth, SmoothOptions
from passes.quantize.static import Static
from tests.passes.models import Transformer, image_batches, token_batches
from tests.passes.quantize.scaled import Llama, Mixed, ViT
from tests.passes.support import apply, captured, relative_error, seeded, sqnr


def spiked(build, seed=0, times=60.0):
    """Return a Program with outliers in two channels of every norm, which weights make up for."""
    model = seeded(build, seed)
    for norm, readers in READERS[build].items():
        module = model.get_submodule(norm)
        for parameter in module.parameters():
            parameter.data[[1, 5]] *= times
        for reader in readers:
            model.get_submodule(reader).weight.data[:, [1, 5]] /= times
    return capture(model, token_batches(1)[0], dynamic={"ids": {0: "batch", 1: "seq"}})


def pre_norm():
    return Transformer(width=16, depth=2, heads=4)


def post_norm():
    return Transformer(width=16, depth=2, heads=4, first=False)


PARTS = ((1, "qkv"), (2, "up"))


def tokens():
    return Context(data={"calibration": token_batches(32)})


READERS = {
    pre_norm: {f"layers.{i}.norm{j}": [f"layers.{i}.{r}"] for i in range(2) for j, r in PARTS},
    post_norm: {"layers.0.norm1": ["layers.0.up"], "layers.1.norm1": ["layers.1.up"]},
    Llama: {
        f"layers.{i}.norm{j}": [f"layers.{i}.{name}" for name in names]
        for i in range(2)
        for j, names in ((1, "qkv"), (2, ("gate", "up")))
    },
}


@pytest.mark.parametrize("alpha", ["search", 0.5, 1.0])
@pytest.mark.parametrize("insert", [False, True])
@pytest.mark.parametrize("build", [pre_norm, post_norm, Llama])
def test_it_is_exact_and_changes_nothing_the_second_time(build, insert, alpha):
    program = spiked(build, times=20)
    options = {"calibration": 16, "insert": insert, "alpha": alpha, "steps": 5}
    result = check_pass(Smooth, program, options, data=tokens().data)
    assert result.edits
    muls = result.graph.count(" mul(") - sum(op_name(n) == "mul" for n in program.nodes)
    assert muls == len(result.decision.inserted)
    assert insert or not muls
    assert relative_error(program, result.program, torch.randint(0, 50, (3, 9))) < 1e-5


@pytest.mark.parametrize("build", [ViT, Mixed])
def test_it_is_exact_on_images(build):
    program = captured(build, 2, 3, 16, 16)
    options = {"calibration": 16, "insert": True, "steps": 5}
    result = check_pass(Smooth, program, options, data={"calibration": image_batches()})
    assert result.edits


@pytest.mark.parametrize("seed", range(2))
def test_static_int8_loses_less_than_half_afterwards(seed):
    program = spiked(pre_norm, seed)
    batch = (torch.randint(0, 50, (16, 12), generator=torch.Generator().manual_seed(7)),)
    smooth = apply(Smooth, program, {"calibration": 128}, tokens()).program
    with_it, without = (
        sqnr(program, apply(Static, each, {"calibration": 128}, tokens()).program, *batch)
        for each in (smooth, program)
    )
    # The squared error must fall to a quarter, the error to half.
    assert with_it > without + 6


def test_multiplications_help_where_nothing_can_take_the_division():
    options = {"calibration": 128, "insert": True}
    made = apply(Smooth, spiked(post_norm), options, tokens()).decision
    spoiled = [each for each in made.groups if each.source.endswith("norm1")]
    assert [each.layers for each in spoiled] == [("layers.0.up",), ("layers.1.up",)]
    assert all(each.after < each.before / 2 for each in spoiled)


def test_the_factors_are_those_of_the_paper():
    program = spiked(pre_norm)
    made = apply(Smooth, program, {"calibration": 128, "alpha": 0.5, "targets": ["head"]}, tokens())
    (group,) = made.decision.groups
    assert (group.source, group.layers, group.alpha) == ("norm", ("head",), 0.5)
    seen = []
    model = seeded(pre_norm)
    model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for batch in token_batches(32):
        model(*batch)
    largest = torch.cat(seen).abs().amax(0)
    wanted = (largest / model.head.weight.abs().amax(0)).sqrt()
    assert torch.allclose(made.decision.arrays["norm.weight.divisor"], wanted, rtol=1e-4)
    assert torch.allclose(made.decision.arrays["head.weight.factor"], wanted, rtol=1e-4)


def test_the_search_finds_the_least_error_of_the_grid():
    program = spiked(pre_norm)
    only = {"calibration": 16, "targets": ["layers.0.up"]}
    errors = {}
    for step in range(6):
        made = apply(Smooth, program, {**only, "alpha": step / 5}, tokens())
        errors[step / 5] = made.decision.groups[0].after
    (found,) = apply(Smooth, program, {**only, "steps": 5}, tokens()).decision.groups
    assert found.alpha == min(errors, key=errors.get)
    assert found.after == pytest.approx(min(errors.values()))
    assert found.after < found.before


def test_reasons_name_what_stands_in_the_way():
    made = apply(Smooth, spiked(post_norm), {"calibration": 16}, tokens())
    reasons = made.reasons()
    assert reasons["layers.0.down"] == (
        "the gelu that makes its inputs has no weight that could take the scale"
    )
    assert reasons["layers.0.up"] == (
        "layers.0.norm1 makes its inputs; layers.0/add@2 reads them and does not pass factors on"
    )
    assert reasons["layers.0.qkv"].startswith("the embedding that makes its inputs")


def test_a_multiplication_must_be_worth_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.GELU(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)).eval()
    # Weights of one size and inputs of one size leave nothing to even out.
    model[1].weight.data = model[1].weight.data.sign() / 4
    model[2].weight.data[3] = 90
    x = torch.rand(16, 8, generator=torch.Generator().manual_seed(0)) + 1
    program = capture(model, (x,))
    data = Context(data={"calibration": [(x,)]})
    made = apply(Smooth, program, {"calibration": 16, "insert": True, "alpha": 0.5}, data)
    assert made.reasons()["1"].startswith("a multiplication would lower its error by")
    assert made.decision.inserted == ()
    assert [group.source for group in made.decision.groups] == ["2"]


def test_a_plan_shows_the_multiplications_before_any_data_is_read():
    program = spiked(post_norm)
    options = SmoothOptions(insert=True)
    decision = Smooth().decide(program, options, Context(planning=True))
    assert len(decision.pending) == len(decision.groups) == 9
    assert all("after calibration (128 samples)" in line for line in decision.pending)
    made = apply(Smooth, program, {"insert": True}, Context(planning=True))
    assert sum(node.startswith("add_tensor") for node in made.kinds()) <= 1
    assert made.ops().count("mul") == len(decision.inserted)
    assert relative_error(program, made.program, torch.randint(0, 50, (3, 9))) == 0


def test_inserted_factors_are_named_after_their_layer():
    made = apply(Smooth, spiked(post_norm), {"calibration": 16, "insert": True}, tokens())
    names = {each.tensor for each in made.decision.inserted}
    assert "layers.0.down_smooth" in names
    assert names <= set(made.program.state())
    ids = set(node_ids(made.program).values())
    assert {each.node for each in made.decision.inserted} <= ids


class TestBadInput:
    def test_nothing_can_take_the_division(self):
        program = captured(lambda: nn.Sequential(nn.GELU(), nn.Linear(4, 4)), 2, 4)
        with pytest.raises(UsageError, match="no layer to smooth") as error:
            apply(Smooth, program)
        assert "the gelu that makes its inputs" in error.value.reason
        assert "insert: true" in error.value.hint

    def test_there_is_no_linear_layer(self):
        program = captured(lambda: nn.Sequential(nn.Conv2d(3, 4, 1)), 2, 3, 4, 4)
        with pytest.raises((UsageError, SelectorError)):
            apply(Smooth, program)

    def test_quantised_layers_are_too_late(self):
        program = apply(
            Static, captured(ViT, 2, 3, 16, 16), {"calibration": 16}, self.images()
        ).program
        with pytest.raises(UsageError) as error:
            apply(Smooth, program, {}, self.images())
        assert "run quantize.smooth before the pass that quantises" in error.value.reason

    def test_no_calibration_data(self):
        with pytest.raises(DataError, match="no split calibration"):
            apply(Smooth, captured(ViT, 2, 3, 16, 16))

    def test_a_nan_in_the_data_is_named(self):
        batch = torch.full((4, 3, 16, 16), float("nan"))
        data = Context(data={"calibration": [(batch,)]})
        with pytest.raises(NumericsError, match="NaN or an infinity in the output of"):
            apply(Smooth, captured(ViT, 2, 3, 16, 16), {"calibration": 4}, data)

    @staticmethod
    def images():
        return Context(data={"calibration": image_batches()})


def test_masks_of_pruning_stay_where_they_are():
    from passes.prune.unstructured import Unstructured

    program = spiked(pre_norm)
    masked = apply(Unstructured, program, {"ratio": 0.5, "mode": "keep"}).program
    made = apply(Smooth, masked, {"calibration": 16, "steps": 4}, tokens())
    assert made.edits
    assert relative_error(masked, made.program, torch.randint(0, 50, (3, 9))) < 1e-5
