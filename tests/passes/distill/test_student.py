"""distill.student: what is built computes what the same model, built by hand, computes."""

import json
from functools import cache

import pytest
import torch
from torch import nn

from fxcompress import Program, compress
from fxcompress._torchvision import declare_operators
from fxcompress.api import prepare
from fxcompress.errors import ModelError, SelectorError, UsageError
from fxcompress.ir import capture
from fxcompress.pipeline.context import Context
from fxcompress.pipeline.plan_text import render_plan
from fxcompress.testing import check_pass
from passes.distill.student import Student
from tests.passes.models import ResNet, Transformer, image_batches, token_batches
from tests.passes.support import apply, seeded


def build(seed):
    return seeded(lambda: Transformer(width=16, depth=6, heads=4), seed)


@cache
def program(seed=0):
    dynamic = {"ids": {0: "batch", 1: "seq"}}
    return capture(build(seed), token_batches(1)[0], dynamic=dynamic)


def of_layers(seed, places):
    model = build(seed)
    model.layers = nn.ModuleList(model.layers[place] for place in places)
    return model, {f"layers.{new}.": f"layers.{old}." for new, old in enumerate(places)}


def narrower(seed, kept):
    model = build(seed)
    for layer in model.layers:
        up, down = layer.up, layer.down
        layer.up, layer.down = nn.Linear(16, kept), nn.Linear(kept, 16)
        layer.up.weight.data, layer.up.bias.data = (
            up.weight[:kept].detach(),
            up.bias[:kept].detach(),
        )
        layer.down.weight.data, layer.down.bias.data = (
            down.weight[:, :kept].detach(),
            down.bias.detach(),
        )
    return model, {}


def tied(seed, size):
    model = build(seed)
    for place in range(6):
        model.layers[place] = model.layers[place - place % size]
    return model, {}


def averaged(seed, first, second):
    model = build(seed)
    with torch.no_grad():
        for a, b in zip(
            model.layers[first].parameters(), model.layers[second].parameters(), strict=True
        ):
            a.copy_((a + b) / 2)
    model.layers[second] = model.layers[first]
    return model, {}


CASES = {
    "every second": ({"every": 2}, lambda seed: of_layers(seed, [0, 2, 4])),
    "listed": ({"layers": [0, 2, 3, 5]}, lambda seed: of_layers(seed, [0, 2, 3, 5])),
    "narrower": ({"width": {"neuron": 0.25}}, lambda seed: narrower(seed, 16)),
    "shared": ({"share": 3}, lambda seed: tied(seed, 3)),
    "mean": ({"share": [[1, 4]], "shared": "mean"}, lambda seed: averaged(seed, 1, 4)),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_model_built_by_hand(case, seed):
    options, make = CASES[case]
    model, names = make(seed)
    student = apply(Student, program(seed), options).program
    (ids,) = token_batches(1, seed=seed + 5)[0]
    mine, its = student.module(ids), model.eval()(ids)
    torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)
    weights = torch.randn(mine.shape, generator=torch.Generator().manual_seed(seed))
    for module, out in ((student.module, mine), (model, its)):
        module.zero_grad()
        (out * weights).sum().backward()
    wanted = {}
    for name, parameter in model.named_parameters():
        prefix = next((new for new in names if name.startswith(new)), None)
        key = name if prefix is None else names[prefix] + name.removeprefix(prefix)
        wanted[key] = parameter.grad
    got = {name: parameter.grad for name, parameter in student.module.named_parameters()}
    assert got.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-5)
    student.module.zero_grad()


def test_layers_of_a_causal_model_are_kept_and_shared():
    declare_operators()
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, vocab_size=50, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = seeded(lambda: LlamaForCausalLM(config))
    ids = token_batches(1)[0][0]
    given = {"input_ids": ids, "use_cache": False, "return_dict": False}
    whole = capture(model, (), given, dynamic={"input_ids": {0: "batch", 1: "seq"}})
    student = apply(Student, whole, {"layers": [0, 1, 3], "share": [[0, 2]]}).program
    first, second, _, _ = model.model.layers
    model.model.layers = nn.ModuleList([first, second, first])
    model.config.num_hidden_layers = 3
    mine, its = student(**given)[0], model(**given)[0]
    torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)
    # The two share their tensors, so each is asked for its gradients alone.
    wanted = dict(model.named_parameters())
    got = dict(student.module.named_parameters())
    assert got.keys() == wanted.keys()
    grads = [
        torch.autograd.grad(out.square().sum(), list(named.values()))
        for out, named in ((mine, got), (its, wanted))
    ]
    its_grads = dict(zip(wanted, grads[1], strict=True))
    for name, grad in zip(got, grads[0], strict=True):
        torch.testing.assert_close(grad, its_grads[name], rtol=1e-4, atol=1e-5)


def test_the_plan_shows_the_map_and_the_parameters():
    decision = apply(Student, program(), {"layers": [0, 2, 5], "share": [[0, 2]]}).decision
    count = sum(p.numel() for p in program().module.parameters())
    block = sum(p.numel() for p in build(0).layers[0].parameters())
    assert [(each.path, each.old, each.new, each.shares) for each in decision.layers] == [
        ("layers.0", 0, 0, 0), ("layers.2", 2, 1, 1), ("layers.5", 5, 2, 0),
    ]  # fmt: skip
    left = count - 4 * block
    assert decision.summary() == (
        "layers: 0 → 0, 2 → 1, 5 → 2",
        "shared: layers.0, layers.5",
        f"parameters: {count:,} → {left:,} ({100 * left / count:.1f} %)",
    )


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([{"use": "distill.student", "every": 2, "width": 0.5, "share": 3}], "0 → 0, 2 → 1"),
        ([{"use": "distill.prompt", "tokens": 2}], "2 virtual tokens before embed"),
        ([{"use": "factorize.lora", "dora": True}, {"use": "factorize.lora_merge"}],
         "parameters train again"),
    ],
)  # fmt: skip
def test_all_is_planned_without_weights(steps, says):
    with torch.device("meta"):
        model = Transformer(width=16, depth=6, heads=4).eval()
    empty = capture(model, token_batches(1)[0], dynamic={"ids": {0: "batch", 1: "seq"}})
    assert says in str(render_plan(prepare(steps, empty).plan()))


def test_all_together_is_trained_by_the_whole_model():
    steps = [
        {"use": "distill.student", "every": 2, "share": 3, "width": 0.5},
        {"use": "train.fit", "steps": 2, "teacher": "original",
         "losses": [{"use": "soft_labels"}]},
    ]  # fmt: skip
    data = {"train": [(batch, torch.zeros(4, dtype=torch.int64)) for batch in token_batches(2)]}
    result = compress(program(), steps, data=data)
    student = result.program
    (ids,) = token_batches(1, seed=9)[0]
    assert student(ids).isfinite().all()
    count = sum(parameter.numel() for parameter in student.module.parameters())
    assert count < sum(p.numel() for p in program().module.parameters()) / 8
    assert {name.split(".")[1] for name in student.state() if name.startswith("layers.")} == {"0"}


def test_a_width_of_a_residual_network():
    net = capture(seeded(ResNet), image_batches(1)[0])
    result = apply(Student, net, {"width": 0.5, "exclude": ["layer2.0.conv1*"]})
    state, before = result.program.state(), net.state()
    assert state["layer1.0.conv1.weight"].shape == (4, 4, 3, 3)
    assert torch.equal(state["stem.0.weight"], before["stem.0.weight"][:4])
    assert state["layer2.0.conv1.weight"].shape[0] == before["layer2.0.conv1.weight"].shape[0]
    magnitude = apply(Student, net, {"width": {"channel": 0.5}, "indices": "magnitude"})
    kept = magnitude.decision.arrays["keep/layer1.0.conv1.weight[0]"]
    assert list(kept) != [0, 1, 2, 3]


OTHER = '''
import torch
from torch import nn

class Bag(nn.Module):
    """A mean of embeddings."""
    def __init__(self, out=7, tie=False):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 4), nn.Linear(4, out)
        self.again = nn.Linear(4, out)
        if tie:
            self.again.weight = self.head.weight

    def forward(self, ids):
        x = self.embed(ids).mean(1)
        return self.head(x) + self.again(x)

class Named(Bag):
    def forward(self, tokens):
        return super().forward(tokens)

class Pair(Bag):
    def forward(self, ids):
        return super().forward(ids), ids

def bag(**options):
    torch.manual_seed(3)
    return Bag(**options)

def named():
    return Named()

def pair():
    return Pair()
'''


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "other.py").write_text(OTHER)
    return Context(folder=tmp_path)


@pytest.mark.parametrize("tie", [False, True])
def test_another_model_takes_its_place(folder, tie):
    options = {"model": {"factory": "other.py:bag", "args": {"tie": tie}}}
    result = check_pass(Student, program(), options, context=folder, idempotent=False)
    student = result.program
    (ids,) = token_batches(1, batch=3, seq=7, seed=4)[0]
    from fxcompress.spec._python import load_factory

    model = load_factory("other.py:bag", folder.folder, ModelError, "model")(tie=tie).eval()
    torch.testing.assert_close(student(ids), model(ids))
    student.module(ids).sum().backward()
    model(ids).sum().backward()
    torch.testing.assert_close(
        student.module.head.weight.grad, model.head.weight.grad, rtol=1e-5, atol=1e-6
    )
    assert bool(student.ties) == tie
    assert result.decision.after == sum(p.numel() for p in model.parameters())
    assert result.decision.summary()[0] == "other.py:bag in the place of Transformer"


def test_another_model_is_replayed_from_the_lock_without_its_code(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = [{"use": "distill.student", "model": {"factory": "other.py:bag"}}]
    first = compress(program(), steps, run_dir=tmp_path / "run")
    (tmp_path / "other.py").unlink()
    again = compress(program(), steps, lock=first.lock).program
    (ids,) = token_batches(1)[0]
    assert torch.equal(again(ids), first.program(ids))
    loaded = Program.load(again.save(tmp_path / "student.fxp"))
    assert torch.equal(loaded(ids), first.program(ids))


@pytest.mark.parametrize(
    ("model", "error", "says"),
    [
        ({"factory": "other.py:bag", "args": {"out": 5}}, UsageError,
         r"its output 0 is f32\[batch,5\], the model's f32\[batch,7\]"),
        ({"factory": "other.py:named"}, ModelError, "must take ids"),
        ({"factory": "other.py:pair"}, UsageError, "it returns"),
        ({"factory": "other.py:none"}, ModelError, "none"),
    ],
)  # fmt: skip
def test_a_model_that_does_not_fit_is_refused(folder, model, error, says):
    with pytest.raises(error, match=says):
        apply(Student, program(), {"model": model}, folder)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"layers": [0, 9]}, UsageError, "there is no layer 9"),
        ({"every": 2, "share": [[0, 3]]}, UsageError, "there is no layer 3 to share"),
        ({"every": 2, "blocks": ["none.*"]}, SelectorError, "`none.*` in `blocks`"),
        ({"width": {"expert": 0.5}}, SelectorError, "expert"),
    ],
)
def test_what_is_not_there_is_an_error(options, error, says):
    with pytest.raises(error, match=says):
        apply(Student, program(), options)


def test_blocks_that_differ_cannot_share():
    model = build(0)
    model.layers[1].act = nn.ReLU()
    odd = capture(model, token_batches(1)[0])
    with pytest.raises(UsageError, match=r"layers\.1 cannot share the tensors of layers\.0"):
        apply(Student, odd, {"share": 2})
    apply(Student, odd, {"share": [[0, 2]]})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "give layers, every, width, share or model"),
        ({"layers": [1, 0]}, "ascending"),
        ({"layers": [0], "every": 2}, "not both"),
        ({"share": 1}, "at least 2"),
        ({"share": [[0, 1], [1, 2]]}, "in one group"),
        ({"share": [[0]]}, "at least two blocks"),
        ({"model": {"factory": "a.py:b"}, "every": 2}, "leave out every"),
    ],
)
def test_options_that_contradict(options, says):
    with pytest.raises(ValueError, match=says):
        Student.Options.model_validate_json(json.dumps(options))
