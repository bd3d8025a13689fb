"""Every loss that reads a teacher, in a training: it gets smaller, and the teacher stays."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxcompress.ir import capture
from fxcompress.pipeline.context import Context
from fxcompress.train import FitConfig, fit, training_copy
from fxcompress.train.joint import Joining
from passes.distill.tap import Tap
from tests.passes.support import apply
from tests.train.losses.cases import CASES


class Vision(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.first(x).relu()
        return self.head(self.second(x).relu().mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.project = nn.Linear(width, 3 * width)

    def forward(self, x):
        q, k, v = (
            each.unflatten(2, (2, -1)).transpose(1, 2) for each in self.project(x).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return attended.transpose(1, 2).flatten(2)


class Text(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.attention = Attention(width)
        self.head = nn.Linear(width, 11)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(x + self.attention(x))


def made(model, width, seed):
    torch.manual_seed(seed)
    net = model(width).eval()
    example = torch.zeros(2, 3, 6, 6) if model is Vision else torch.zeros(2, 6, dtype=torch.long)
    return capture(net, (example,))


@pytest.fixture(scope="module")
def pairs():
    taps = {
        Vision: [{"name": "a", "at": "first"}, {"name": "b", "at": "second"}],
        Text: [
            {"name": "a", "at": "attention"},
            {"name": "p", "at": "attention", "what": "attention"},
            {"name": "v", "at": "attention", "what": "value"},
        ],
    }
    found = {}
    for model, told in taps.items():
        teacher = made(model, 16, 1)
        tapped = apply(Tap, made(model, 8, 0), {"taps": told}, Context(original=teacher))
        found[model] = tapped.program, teacher
    return found


def learned(program, teacher, options, batches):
    module = training_copy(program)
    config = FitConfig.model_validate(
        {"epochs": 6, "shuffle": "none", "losses": [options],
         "optimizer": {"use": "Adam", "lr": 0.02}}
    )  # fmt: skip
    before = {name: tensor.clone() for name, tensor in teacher.module.state_dict().items()}
    joining = Joining(replace(program, module=module), teacher)
    history = fit(module, config, batches, joining=joining).history
    assert all(torch.equal(before[k], v) for k, v in teacher.module.state_dict().items())
    return [epoch.loss for epoch in history]


VISION = [
    *({"use": use} for use in ("soft_labels", "reverse_kl", "jensen_shannon", "dist", "ranking")),
    {"use": "mse", "against": "teacher"},
    {"use": "features"},
    {"use": "features", "distance": "cosine", "taps": ["b"]},
    {"use": "attention_transfer"},
    {"use": "fsp"},
    {"use": "rkd"},
    {"use": "similarity_preserving"},
    {"use": "cka"},
    {"use": "crd", "dim": 16, "temperature": 0.5},
]
TEXT = [
    {"use": "soft_labels", "shift": True, "top_k": {"from": 3, "until": 0.1}},
    {"use": "features", "distance": "smooth_l1", "taps": ["a"]},
    {"use": "attention_kl", "taps": ["p"]},
    {"use": "minilm", "taps": ["v"]},
    {"use": "minilm", "taps": ["a"], "heads": 4},
]


@pytest.mark.parametrize("options", VISION, ids=lambda each: "-".join(map(str, each.values())))
def test_a_vision_model_learns(pairs, options):
    draw = torch.Generator().manual_seed(0)
    batches = [((torch.randn(8, 3, 6, 6, generator=draw),), torch.arange(8) % 5) for _ in range(4)]
    losses = learned(*pairs[Vision], options, batches)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("options", TEXT, ids=lambda each: "-".join(map(str, each.values())))
def test_a_language_model_learns(pairs, options):
    draw = torch.Generator().manual_seed(0)
    batches = [((torch.randint(0, 11, (8, 6), generator=draw),), None) for _ in range(4)]
    losses = learned(*pairs[Text], options, batches)
    assert losses[-1] < 0.9 * losses[0]


def test_every_loss_with_a_teacher_is_trained():
    taught = {case.options["use"] for case in CASES if case.kind in ("logits", "taps")}
    assert taught == {each["use"] for each in (*VISION, *TEXT)} | {"ctkd"}


def test_a_learned_temperature_moves(pairs):
    """Trained along with the model, against it: the loss alone does not say whether it learns."""
    draw = torch.Generator().manual_seed(0)
    batches = [((torch.randn(8, 3, 6, 6, generator=draw),), None) for _ in range(4)]
    options = {"use": "ctkd", "reversal": 1.0}
    losses = learned(*pairs[Vision], options, batches)
    assert losses != learned(*pairs[Vision], {**options, "reversal": 0.0}, batches)
