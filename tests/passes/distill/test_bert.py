"""A joint program of two models of transformers: named outputs, masks, and relations of values."""

from functools import cache

import torch

from fxcompress._torchvision import declare_operators
from fxcompress.ir import capture
from fxcompress.pipeline.context import Context
from fxcompress.train.joint import join, strip
from passes.distill.tap import Tap
from tests.passes.support import apply
from tests.train.joint.models import terms

LOSSES = (
    {"use": "soft_labels"},
    {"use": "features", "taps": ["hidden_0", "hidden_1"]},
    {"use": "minilm", "taps": ["values"]},
    {"use": "attention_kl", "taps": ["shares"]},
)


@cache
def bert(width, depth):
    declare_operators()
    import transformers

    torch.manual_seed(width)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=width, num_hidden_layers=depth, num_attention_heads=2,
        intermediate_size=2 * width, num_labels=3,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    sizes = {name: {0: "batch", 1: "seq"} for name in batch()}
    return capture(model, (), batch(), dynamic=sizes, verify=False)


def batch(padding=0):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 40, (3, 7), generator=generator)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:], mask[2, 6:] = 0, 0
    return {"input_ids": torch.where(mask > 0, ids, padding), "attention_mask": mask}


def joined():
    options = {
        "layers": {"at": "bert.encoder.layer.*", "name": "hidden"},
        "taps": [
            {"name": name, "at": "bert.encoder.layer.1", "what": what,
             "teacher": "bert.encoder.layer.3"}
            for name, what in (("values", "value"), ("shares", "attention"))
        ],
    }  # fmt: skip
    student = apply(Tap, bert(16, 2), options, Context(original=bert(24, 4))).program
    return student, join(student, bert(24, 4), terms(*LOSSES))


def test_features_attention_and_relations_at_once():
    student, joint = joined()
    fits = {pair.name: (pair.teacher, str(pair.fitting)) for pair in joint.pairs}
    assert fits["hidden_0"] == ("bert.encoder.layer.1.output.LayerNorm", "linear 16 → 24")
    assert fits["hidden_1"] == ("bert.encoder.layer.3.output.LayerNorm", "linear 16 → 24")
    assert fits["values"][1] == fits["shares"][1] == ""
    step = joint(batch(), None, 0.0)
    assert torch.equal(step.output["logits"], student(**batch())["logits"])
    for total, _ in step.totals.values():
        assert torch.isfinite(total)
        assert total.detach() > 0
        (gradient,) = torch.autograd.grad(
            total, [student.state()["bert.encoder.layer.0.attention.self.value.weight"]],
            retain_graph=True,
        )  # fmt: skip
        assert gradient.abs().max() > 0
    assert strip(joint).text() == student.text()


def test_padding_changes_no_loss():
    _, joint = joined()
    one, other = (joint(batch(padding), None, 0.0).totals for padding in (0, 17))
    for name, (total, count) in one.items():
        same = torch.allclose(total, other[name][0], rtol=1e-5, atol=1e-7)
        assert same, name
        assert float(count) == float(other[name][1])
