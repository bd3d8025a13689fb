"""Taps change no output, stand on the value they name, and follow it through other passes."""

from functools import cache

import pytest
import torch
from torch import nn

from fxcompress._torchvision import declare_operators
from fxcompress.analysis import cost
from fxcompress.axes import analyze
from fxcompress.emit._plain import plain_program
from fxcompress.emit.driver import write_unproved
from fxcompress.errors import SelectorError, UsageError
from fxcompress.ir import Program, capture, node_ids
from fxcompress.nn import Tap as TapModule
from fxcompress.pipeline.context import Context
from fxcompress.rewrite import GraphRewriter, Put, put_taps, taps_of, without_taps
from passes.depth.skip_blocks import SkipBlocks
from passes.distill.tap import Tap
from passes.prune.channels import Channels
from passes.quantize.qat import Qat
from passes.tidy.fold_batchnorm import FoldBatchNorm
from tests.passes.models import ResNet, Transformer, image_batches, token_batches
from tests.passes.support import apply, captured, seeded


def resnet():
    return captured(ResNet, 2, 3, 16, 16)


@cache
def hugging_face(kind):
    """Return a tiny model of the library with the names of the real ones, and a batch."""
    declare_operators()
    import transformers

    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    if kind == "bert":
        config = transformers.BertConfig(**sizes, num_attention_heads=2)
        model = transformers.BertModel(config, add_pooling_layer=False)
    else:
        config = transformers.LlamaConfig(
            **sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False
        )
        model = transformers.LlamaForCausalLM(config)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 5:] = 0
    batch = {"input_ids": torch.randint(0, 40, (3, 7)), "attention_mask": mask}
    sizes = {name: {0: "batch", 1: "seq"} for name in batch}
    return capture(model.eval(), (), batch, dynamic=sizes, verify=False), batch


def tapped(program, *taps, **context):
    entries = [dict(zip(("name", "at", "what", "teacher"), tap, strict=False)) for tap in taps]
    return apply(Tap, program, {"taps": entries}, Context(**context))


def read_by(program):
    ids = node_ids(program)
    return {name: ids[node.all_input_nodes[0]] for name, node in taps_of(program).items()}


def test_a_resnet_keeps_its_outputs_bit_for_bit():
    before = resnet()
    result = tapped(before, ("mid", "layer1"), ("end", "layer2.1"), ("stem", "stem.1", "input"))
    assert read_by(result.program) == {
        "mid": "layer1.1.relu@2", "end": "layer2.1.relu@2", "stem": "stem.0",
    }  # fmt: skip
    x = torch.randn(5, 3, 16, 16)
    assert torch.equal(before(x), result.program(x))
    assert result.kinds() == {"add-node": 3}
    assert cost(before).summary() == cost(result.program).summary()
    assert without_taps(result.program).text() == before.text()


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_transformer_keeps_its_outputs_bit_for_bit(kind):
    before, batch = hugging_face(kind)
    layer = "encoder.layer" if kind == "bert" else "model.layers"
    result = tapped(
        before,
        ("hidden", f"{layer}.0"),
        ("into", f"{layer}.0", "input"),
        *((each, f"{layer}.1", each) for each in ("query", "key", "value")),
    )
    a, b = before(**batch), result.program(**batch)
    key = "last_hidden_state" if kind == "bert" else "logits"
    assert torch.equal(a[key], b[key])
    found = read_by(result.program)
    ends = {"bert": "encoder.layer.0.output.LayerNorm", "llama": "model.layers.0/add@2"}
    assert found["hidden"] == ends[kind]
    nodes = taps_of(result.program)
    assert {tuple(nodes[k].meta["val"].shape)[1::2] for k in ("query", "key", "value")} == {
        (2, 8) if kind == "bert" else (4, 4)
    }


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_attention_is_written_out_where_it_is_tapped(kind):
    before, batch = hugging_face(kind)
    layer = "encoder.layer.0" if kind == "bert" else "model.layers.0.self_attn"
    result = tapped(before, ("shares", layer, "attention"))
    assert result.ops().count("sdpa") == before.text(state=False).count("= sdpa(") - 1
    key = "last_hidden_state" if kind == "bert" else "logits"
    a, b = (p(**batch)[key].detach() for p in (before, result.program))
    assert float((a - b).abs().max()) <= 1e-6 * float(a.abs().max())
    assert str(taps_of(result.program)["shares"].meta["val"].shape[1]) == (
        "2" if kind == "bert" else "4"
    )


@pytest.mark.parametrize("kind", ["resnet", "bert", "llama"])
def test_a_tap_on_every_value_changes_nothing(kind):
    before, batch = (resnet(), None) if kind == "resnet" else hugging_face(kind)
    places = [
        name
        for node, name in node_ids(before).items()
        if isinstance(node.meta.get("val"), torch.Tensor) and node.op not in ("get_attr", "output")
    ]
    rewriter = GraphRewriter(before)
    put_taps(rewriter, [Put(TapModule(f"t{i}"), name) for i, name in enumerate(places)])
    after = rewriter.finish()
    after.verify()
    assert len(taps_of(after)) == len(places) > 30
    assert without_taps(after).text() == before.text()
    if batch is None:
        x = torch.randn(3, 3, 16, 16)
        assert torch.equal(before(x), after(x))
    else:
        pairs = zip(before(**batch).values(), after(**batch).values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_attention_that_is_open_is_tapped_as_it_is():
    before, batch = hugging_face("bert")
    opened = tapped(before, ("shares", "encoder.layer.0", "attention")).program
    again = tapped(opened, ("queries", "encoder.layer.0", "query"))
    assert torch.equal(
        opened(**batch)["last_hidden_state"], again.program(**batch)["last_hidden_state"]
    )
    bare = without_taps(opened)
    result = tapped(bare, ("shares", "encoder.layer.0", "attention"))
    assert result.kinds() == {"add-node": 1}


# -- following ---------------------------------------------------------------------------------


def test_survives_files(tmp_path):
    program = tapped(resnet(), ("mid", "layer1", "output", "stage.1")).program
    again = Program.load(program.save(tmp_path / "p.fxp"))
    assert again.text() == program.text()
    (tap,) = [m for m in again.module.modules() if type(m).__name__ == "Tap"]
    assert (tap.name, tap.at, tap.what, tap.teacher) == ("mid", "layer1", "output", "stage.1")


def test_nothing_emitted_has_taps(tmp_path):
    program = tapped(resnet(), ("mid", "layer1")).program
    write_unproved(program, tmp_path, "program")
    assert Program.load(tmp_path / "model.fxp").text() == resnet().text()
    plain = plain_program(program)
    assert "tap" not in " ".join(str(n.target) for n in plain.module.graph.nodes)
    assert plain_program(resnet()).module.code == plain.module.code


def test_follows_a_norm_into_its_layer():
    program = tapped(resnet(), ("normed", "layer1.0.bn1")).program
    folded = apply(FoldBatchNorm, program)
    assert read_by(folded.program) == {"normed": "layer1.0.conv1"}
    assert "batch_norm" not in folded.ops()


def test_a_norm_after_a_tap_stays():
    program = tapped(resnet(), ("raw", "layer1.0.conv1")).program
    folded = apply(FoldBatchNorm, program)
    assert read_by(folded.program) == {"raw": "layer1.0.conv1"}
    assert "layer1.0.conv1 has 2 users" in folded.reasons()["layer1.0.bn1"]


def test_shrinks_with_its_channels():
    program = tapped(resnet(), ("inner", "layer1.0.conv1"), ("mid", "layer1")).program
    ours, bare = analyze(program), analyze(resnet())
    assert [axis.name for axis in ours.axes] == [axis.name for axis in bare.axes]
    pruned = apply(Channels, program, {"ratio": 0.5})
    shapes = {name: node.meta["val"].shape[1] for name, node in taps_of(pruned.program).items()}
    assert shapes == {"inner": 4, "mid": 4}
    plain = apply(Channels, resnet(), {"ratio": 0.5})
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(plain.program(x), pruned.program(x))


def transformer():
    return of_depth(4)


def test_moves_to_the_input_of_a_block_that_is_skipped():
    program = tapped(transformer(), ("second", "layers.1"), ("third", "layers.2")).program
    result = apply(SkipBlocks, program, {"layers": [1]})
    found = read_by(result.program)
    assert found["second"] == read_by(tapped(transformer(), ("x", "layers.0")).program)["x"]
    ids = token_batches(1)[0][0]
    assert torch.equal(
        result.program(ids), apply(SkipBlocks, transformer(), {"layers": [1]}).program(ids)
    )


def test_a_block_with_a_tap_inside_is_not_skipped():
    program = tapped(transformer(), ("inner", "layers.1.norm2")).program
    with pytest.raises(UsageError, match=r"taps\.inner"):
        apply(SkipBlocks, program, {"layers": [1]})
    data = Context(data={"calibration": token_batches(2)})
    result = apply(SkipBlocks, program, {"count": 3, "calibration": 8}, data)
    assert "taps.inner" in result.reasons()["layers.1"]
    assert [b.index for b in result.decision.blocks if b.skip] == [0, 2, 3]


def test_follows_into_quantization_aware_training():
    data = Context(data={"calibration": image_batches(2)})
    program = tapped(resnet(), ("mid", "layer1"), ("normed", "layer2.0.bn1")).program
    options = {
        "calibration": 8,
        "activations": {"observer": "minmax"},
        "weights": {"observer": "minmax"},
    }
    result = apply(Qat, program, options, data)
    plain = apply(Qat, resnet(), options, data)
    x = image_batches(1)[0][0]
    assert torch.equal(result.program(x), plain.program(x))
    assert set(taps_of(result.program)) == {"mid", "normed"}
    assert without_taps(result.program).text() == plain.program.text()


def test_follows_a_replaced_node():
    program = tapped(resnet(), ("mid", "layer1")).program
    rewriter = GraphRewriter(program)
    relu = rewriter.node("layer1.1.relu@2")
    new = rewriter.call_function(torch.relu, (relu.args[0],), after=relu)
    rewriter.replace_uses(relu, new)
    rewriter.remove(relu)
    assert read_by(rewriter.finish()) == {"mid": "layer1.1/relu"}


# -- layers ------------------------------------------------------------------------------------


@cache
def of_depth(depth, seed=0):
    model = seeded(lambda: Transformer(width=16, depth=depth, heads=2), seed)
    sizes = {"ids": {0: "batch", 1: "seq"}}
    return capture(model, token_batches(1)[0], dynamic=sizes, verify=False)


def layers(student, teacher, planning=False, **options):
    data = {"calibration": token_batches(2)}
    context = Context(data=data, original=teacher, planning=planning)
    options = {"layers": {"at": "layers.*", "calibration": 8, **options}}
    return apply(Tap, student, options, context).decision


@pytest.mark.parametrize(
    ("how", "wanted"),
    [("uniform", [1, 3, 5]), ("last", [3, 4, 5]), ([[0, 4], [2, 5]], [4, 5])],
    ids=["uniform", "last", "list"],
)
def test_layers_are_matched(how, wanted):
    decision = layers(of_depth(3), of_depth(6), map=how, name="h")
    assert [tap.teacher for tap in decision.taps] == [f"layers.{i}" for i in wanted]
    names = ["h_0", "h_2"] if isinstance(how, list) else ["h_0", "h_1", "h_2"]
    assert [tap.name for tap in decision.taps] == names


def test_similarity_finds_layers_that_were_taken_out():
    teacher = of_depth(5)
    student = apply(SkipBlocks, teacher, {"layers": [1, 3]}).program
    # Weights of the layers that stay are those of the teacher; their inputs changed a little.
    decision = layers(student, teacher, map="similarity", what="output")
    (mapping,) = decision.mappings
    assert mapping.student == ("layers.0", "layers.2", "layers.4")
    assert mapping.chosen[0] == 0
    assert mapping.similarity[0][0] == pytest.approx(1, abs=1e-5)
    assert all(0 <= value <= 1 + 1e-5 for row in mapping.similarity for value in row)
    (figure,) = decision.figures()
    assert figure.chosen == mapping.chosen
    assert figure.columns == mapping.teacher


def test_similarity_of_layers_of_other_sizes_is_that_of_means():
    student, teacher = (
        capture(seeded(lambda width=width: ResNet(width), 0), (torch.randn(2, 3, 16, 16),))
        for width in (4, 8)
    )
    options = {"layers": {"at": "layer?", "map": "similarity", "calibration": 8}}
    context = Context(data={"calibration": image_batches(2)}, original=teacher)
    (mapping,) = apply(Tap, student, options, context).decision.mappings
    assert mapping.chosen == (0, 1)
    assert all(0 < value < 1 for row in mapping.similarity for value in row)


def test_a_plan_names_what_similarity_will_decide():
    decision = layers(of_depth(2), of_depth(4), planning=True, map="similarity")
    assert "known after measuring" in decision.pending[0]
    assert decision.figures() == ()


# -- bad input ---------------------------------------------------------------------------------


def fails(error, program, *entries, original=None, match):
    options = (
        {"taps": list(entries)}
        if "at" in entries[0] and "name" in entries[0]
        else {"layers": list(entries)}
    )
    with pytest.raises(error, match=match):
        apply(Tap, program, options, Context(original=original))


def test_a_place_that_is_not_there_is_named():
    fails(SelectorError, resnet(), {"name": "x", "at": "layer9"}, match="no module and no node")
    fails(SelectorError, resnet(), {"name": "x", "at": "layer1.0.relu"}, match="2 times")
    fails(
        SelectorError,
        resnet(),
        {"name": "x", "at": "layer1", "what": "attention"},
        match="no attention",
    )
    fails(
        SelectorError, transformer(), {"name": "x", "at": "layers.*"}, match="no module and no node"
    )


def test_a_module_with_two_outputs_is_not_one_place():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Split()

        def forward(self, x):
            a, b = self.inner(x)
            return a * b

    class Split(nn.Module):
        def forward(self, x):
            return x + 1, x * 2

    program = capture(Two(), (torch.randn(2, 3),))
    fails(SelectorError, program, {"name": "x", "at": "inner"}, match="makes 2 values")


def test_counterparts_are_looked_up():
    student, teacher = of_depth(3), of_depth(2)
    fails(
        SelectorError,
        student,
        {"name": "x", "at": "layers.2"},
        original=teacher,
        match="in the teacher",
    )
    fails(
        UsageError,
        student,
        {"at": "layers.*"},
        original=teacher,
        match="3 layers cannot learn from 2",
    )
    fails(
        UsageError,
        student,
        {"at": "layers.*", "map": [[0, 7]]},
        original=teacher,
        match="no layer 7",
    )
    fails(SelectorError, student, {"at": "blocks.*"}, original=teacher, match="matches no module")


def test_two_taps_are_two():
    fails(
        UsageError, resnet(), {"name": "a", "at": "layer1"}, {"name": "b", "at": "layer1.1"},
        match="read one value",
    )  # fmt: skip
    once = tapped(resnet(), ("a", "layer1")).program
    fails(UsageError, once, {"name": "a", "at": "layer2"}, match="two taps are called a")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "say what to tap"),
        ({"taps": [{"name": "a", "at": "x"}, {"name": "a", "at": "y"}]}, "two taps are called a"),
        ({"layers": {"at": "x", "map": [[0, 1], [1, 1]]}}, "not one-to-one: teacher layer 1"),
        ({"layers": {"at": "x", "map": []}}, "lists no pairs"),
        ({"taps": [{"name": "a b", "at": "x"}]}, "pattern"),
        ({"taps": [{"name": "a", "at": "x"}], "teacher": {"spec": "a", "run": "b"}}, "either"),
    ],
    ids=str,
)
def test_options_are_checked(options, match):
    with pytest.raises(ValueError, match=match):
        Tap.Options.model_validate(options)
