"""Adapters: the same outputs at the start, the gradients of the formula, an exact merge."""

import random

import pytest
import torch

from fxcompress import compress
from fxcompress.analysis import cost
from fxcompress.api import prepare
from fxcompress.emit import emit
from fxcompress.errors import PassError, SelectorError
from fxcompress.ir import Program, capture
from fxcompress.pipeline.context import Context
from fxcompress.pipeline.plan_text import render_plan
from fxcompress.pipeline.selectors import Selector
from fxcompress.rewrite import find_adapters
from passes.factorize.lora import Lora
from passes.factorize.lora_merge import LoraMerge
from passes.train._parameters import selected
from tests.axes.support import check
from tests.passes.factorize.adapted import (
    KINDS,
    MODELS,
    as_weights,
    disturb,
    mixed,
    moved,
    outputs_and_gradients,
    resnet,
    trained,
    transformer,
)
from tests.passes.support import apply

EVERY = [(model, kind) for model in MODELS for kind in KINDS]


@pytest.mark.parametrize(("model", "kind"), EVERY)
def test_outputs_are_the_same_bits_at_the_start(model, kind):
    program, batch = MODELS[model](seed=1)
    result = apply(Lora, program, KINDS[kind])
    assert torch.equal(program(*batch), result.program(*batch))
    assert selected(result.program, Selector()) == sorted(
        (name for name in result.program.state() if "_lora" in name),
        key=list(dict(result.program.module.named_parameters())).index,
    )


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("model", "kind"), EVERY)
def test_outputs_and_gradients_are_those_of_the_formula(model, kind, seed):
    program, batch, adapted = moved(model, kind, seed)
    leaves, again = trained(adapted), trained(adapted)
    out, loss = outputs_and_gradients(adapted.module, leaves, batch)
    wanted, reference = outputs_and_gradients(program.module, as_weights(adapted, again), batch)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out, program(*batch), atol=1e-2)
    pairs = zip(
        torch.autograd.grad(loss, list(leaves.values())),
        torch.autograd.grad(reference, list(again.values())),
        strict=True,
    )
    for name, (mine, its) in zip(leaves, pairs, strict=True):
        if name == "embed_lora.A.weight" and model == "mixed":
            its[0] = 0.0  # nothing trains the padding row
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-4 * float(its.abs().max()))


@pytest.mark.parametrize(("model", "kind"), EVERY)
def test_merging_keeps_outputs_and_gives_the_graph_back(model, kind):
    program, batch, adapted = moved(model, kind)
    merged = apply(LoraMerge, adapted).program
    torch.testing.assert_close(merged(*batch), adapted(*batch), rtol=1e-4, atol=1e-5)
    assert merged.text(state=False) == program.text(state=False)
    kinds = [
        {path: type(each) for path, each in made.module.named_modules() if path}
        for made in (merged, program)
    ]
    assert kinds[0] == kinds[1]
    assert all(parameter.requires_grad for parameter in merged.module.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["resnet", "transformer"])
def test_adapters_follow_axes(model, kind):
    """Pruned, the adapted model is the adapted one with what is removed held at zero."""
    _, batch, adapted = moved(model, kind)
    analysis, keep, after = check(adapted, batch, random.Random(0), control=False)
    assert not analysis.unknown
    ranks = {axis for axis in keep if axis.name.endswith("_lora.A.weight[0]")}
    assert ranks
    assert len(ranks) < len(keep)
    for adapter in find_adapters(after).values():
        weight = after.state()[adapter.weight]
        up = after.state()[f"{adapter.path}.B.weight"]
        assert up.shape[0] == weight.shape[1 if adapter.op == "embedding" else 0]
        assert up.shape[1] == adapter.rank
    merged = apply(LoraMerge, after).program
    torch.testing.assert_close(merged(*batch), after(*batch), rtol=1e-3, atol=1e-4)


def test_a_plan_shows_adapters_and_hides_what_is_frozen():
    text = str(render_plan(prepare([{"use": "factorize.lora", "rank": 2}], resnet()[0]).plan()))
    assert "+ layer1.0.conv1_lora.A" in str(
        render_plan(prepare([{"use": "factorize.lora"}], resnet()[0]).plan(), verbose=True)
    )
    assert "11 adapters; 1,946 parameters train (14.86 % of 13,092), 11,146 are frozen" in text
    assert "bn1.weight" not in text


def test_costs_count_the_adapters():
    program, _ = resnet()
    adapted = apply(Lora, program, {"targets": ["head"], "rank": 3})
    grown = cost(adapted.program).parameters - cost(program).parameters
    assert grown == adapted.decision.trained == 3 * (16 + 10)
    assert cost(adapted.program).macs - cost(program).macs == 3 * (16 + 10)


def test_training_moves_adapters_alone_and_survives_the_merge():
    program, batch = resnet()
    data = {"train": [(batch, torch.tensor([1, 2]))]}
    steps = [
        {"use": "factorize.lora", "rank": 2, "train": ["head.bias"]},
        {"use": "train.fit", "epochs": 2, "losses": [{"use": "hard_labels"}],
         "optimizer": {"use": "SGD", "lr": 0.1}},
    ]  # fmt: skip
    fitted = compress(program, steps, data=data).program
    changed = {
        name
        for name, tensor in program.state().items()
        if not torch.equal(tensor, fitted.state()[name])
    }
    assert changed == {"head.bias"}
    merged = compress(fitted, [{"use": "factorize.lora_merge"}]).program
    torch.testing.assert_close(merged(*batch), fitted(*batch), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(merged(*batch), program(*batch))


def test_a_frozen_program_survives_its_file(tmp_path):
    adapted = apply(Lora, resnet()[0], {"rank": 2}).program
    again = Program.load(adapted.save(tmp_path / "m.fxp"))
    flags = {n: p.requires_grad for n, p in adapted.module.named_parameters()}
    assert {n: p.requires_grad for n, p in again.module.named_parameters()} == flags
    assert find_adapters(again).keys() == find_adapters(adapted).keys()


def test_merging_leaves_frozen_what_the_original_froze():
    from tests.passes.models import ResNet
    from tests.passes.support import seeded

    model = seeded(ResNet)
    model.stem.requires_grad_(False)
    program = capture(model, resnet()[1])
    adapted = apply(Lora, program, {"targets": ["head"]}).program
    merged = apply(LoraMerge, adapted, context=Context(original=program)).program
    frozen = {n for n, p in merged.module.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, p in program.module.named_parameters() if not p.requires_grad}
    assert frozen


def test_ranks_by_glob_and_merging_a_part():
    program, batch = transformer()
    options = {"targets": ["layers.*"], "types": ["linear"], "rank": 4, "ranks": {"*.qkv": 2}}
    adapted = disturb(apply(Lora, program, options | {"expect": 4}).program)
    assert {a.layer: a.rank for a in find_adapters(adapted).values() if a.rank == 2} == {
        "layers.0.qkv": 2,
    }  # fmt: skip
    part = apply(LoraMerge, adapted, {"targets": ["*.up", "*.down"], "expect": 2})
    assert len(find_adapters(part.program)) == 2
    assert part.decision.thaw == ()
    torch.testing.assert_close(part.program(*batch), adapted(*batch), rtol=1e-4, atol=1e-5)


def test_the_seed_and_the_layer_decide_on_the_first_values():
    program, _ = transformer()
    one = apply(Lora, program, {"targets": ["head"]}).decision.arrays
    more = apply(Lora, program, {"targets": ["head", "layers.*"]}).decision.arrays
    other = apply(Lora, program, {"targets": ["head"]}, Context(seed=1)).decision.arrays
    assert torch.equal(one["head_lora.A.weight"], more["head_lora.A.weight"])
    assert not torch.equal(one["head_lora.A.weight"], other["head_lora.A.weight"])


def test_a_tied_weight_is_untied_by_its_adapter():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(11, 8)
            self.head = torch.nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    torch.manual_seed(0)
    ids = torch.arange(6).reshape(2, 3)
    program = capture(Tied().eval(), (ids,))
    adapted = disturb(apply(Lora, program, {"targets": ["head"]}).program)
    merged = apply(LoraMerge, adapted)
    torch.testing.assert_close(merged.program(ids), adapted(ids))
    assert merged.program.ties == {}
    assert torch.equal(merged.program.state()["embed.weight"], program.state()["embed.weight"])
    assert "no longer tied to embed.weight" in merged.decision.summary()[0]


def test_layers_that_take_none_are_declined_with_the_reason():
    result = apply(Lora, mixed()[0])
    assert result.reasons() == {"depthwise": "it is a convolution in 6 groups"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"targets": ["nothing"]}, "matches nothing"),
        ({"targets": ["depthwise"]}, "it is a convolution in 6 groups"),
        ({"targets": ["blocks.*"], "expect": 3}, "2 layers are selected, 3 are expected"),
        ({"ranks": {"none.*": 2}}, "`none.\\*` in `ranks` matches no selected layer"),
        ({"train": ["none.*"]}, "`none.\\*` in `train` matches no parameter"),
        ({"types": ["conv2d"]}, "`conv2d` in `types` matches nothing"),
    ],
)
def test_selections_that_fit_nothing_say_what_there_is(options, says):
    with pytest.raises(SelectorError, match=says):
        apply(Lora, mixed()[0], options)


def test_options_that_contradict():
    with pytest.raises(ValueError, match="the adapter's files say dora, rank"):
        Lora.Options(adapter="somewhere", rank=4, dora=True)
    with pytest.raises(ValueError, match="ranks must be at least 1"):
        Lora.Options(ranks={"*": 0})


def test_a_row_of_zeros_has_no_direction():
    program, _ = mixed()
    program.state()["blocks.0.weight"].data[2] = 0.0
    result = apply(Lora, program, {"dora": True})
    assert result.reasons()["blocks.0"] == "a row of its weight is zero, which has no direction"


def test_nothing_to_merge_and_adapters_out_of_form():
    program, batch = resnet()
    with pytest.raises(SelectorError, match="there is no adapter to merge"):
        apply(LoraMerge, program)
    adapted = apply(Lora, program, {"targets": ["head"]}).program
    steps = [{"use": "quantize.static", "calibration": 4}]
    quantised = compress(adapted, steps, data={"calibration": [batch] * 2}).program
    with pytest.raises(PassError, match="not in the form that it was inserted in"):
        apply(LoraMerge, quantised)


def test_a_quantised_layer_takes_an_adapter_that_cannot_be_merged():
    program, batch = transformer()
    quantised = compress(program, [{"use": "quantize.weight_only", "group": 4}]).program
    adapted = apply(Lora, quantised, {"targets": ["layers.*"]}).program
    assert torch.equal(adapted(*batch), quantised(*batch))
    with pytest.raises(PassError, match="reads its weight through"):
        apply(LoraMerge, adapted)
    result = apply(Lora, quantised, {"types": ["embedding", "linear"], "dora": True})
    assert any("DoRA needs its weight" in reason for reason in result.reasons().values())


def test_an_unmerged_magnitude_is_written_as_python(tmp_path):
    program, _ = mixed()
    result = apply(Lora, program, {"dora": True, "rank": 2})
    (made,) = emit(result.program, tmp_path, ["python"])
    assert made.comparison.relative < 1e-6
    source = (tmp_path / "model.py").read_text()
    assert "vector_norm" in source
    assert "F.linear" in source
    assert "fxcompress" not in source.partition('"""\n')[2]
