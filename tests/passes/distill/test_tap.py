"""Taps change no output and stand on the value they name."""

import pytest
import torch

from fxcompress.analysis import cost
from fxcompress.ir import node_ids
from fxcompress.nn import Tap as TapModule
from fxcompress.rewrite import GraphRewriter, Put, put_taps, taps_of, without_taps
from tests.passes.distill.taps import hugging_face, read_by, resnet, tapped


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
