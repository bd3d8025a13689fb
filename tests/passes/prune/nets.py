"""Models whose axes criteria and compensation are tested on."""

import torch
from torch import nn
from torch.nn import functional as F

from fxcompress.axes import analyze
from fxcompress.ir import capture
from fxcompress.pipeline.context import Context
from passes.prune._criteria.options import Criterion
from passes.prune._criteria.score import score
from tests.passes.support import seeded

EVERY = (
    "l1", "l2", "bn_scale", "fpgm", "lamp", "taylor", "fisher", "obd", "activation_norm", "apoz",
    "wanda", "random",
)  # fmt: skip
WITH_DATA = ("taylor", "fisher", "obd", "activation_norm", "apoz", "wanda")


class Plain(nn.Module):
    """conv1 → bn1 → conv2 → bn2 → flatten → fc1 → fc2: every way to read a channel."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.fc1, self.fc2 = nn.Linear(4 * 9, 7), nn.Linear(7, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class Joined(nn.Module):
    """Two branches that are concatenated, and a grouped convolution that reads them."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 3, padding=1)
        self.mix, self.grouped = nn.Conv2d(10, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)
        x = F.relu(self.grouped(F.relu(self.mix(x))))
        return self.head(x.mean((2, 3)))


class Language(nn.Module):
    """Embedding, one hidden layer, logits of the next token."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.head = nn.Embedding(20, 8), nn.Linear(8, 12), nn.Linear(12, 20)

    def forward(self, ids):
        return self.head(F.gelu(self.up(self.embed(ids))))


class Attention(nn.Module):
    """Queries and keys of a width of their own, values of another."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(8, 12), nn.Linear(8, 12)
        self.v, self.out = nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x):
        heads = [
            each(x).unflatten(-1, (2, -1)).transpose(1, 2) for each in (self.q, self.k, self.v)
        ]
        mixed = F.scaled_dot_product_attention(*heads)
        return self.out(mixed.transpose(1, 2).flatten(2)).mean(1)


class Task:
    """A model with its Program, its axes, and labelled calibration data."""

    def __init__(self, build, batches, classes=5, seed=0, labels=True, double=False):
        self.model = seeded(build, seed)
        if double:
            self.model.double()
            batches = [tuple(each.double() for each in batch) for batch in batches]
        self.batches = batches
        generator = torch.Generator().manual_seed(seed)
        self.labels = [
            torch.randint(0, classes, (len(b[0]),), generator=generator) for b in batches
        ]
        self.program = capture(self.model, batches[0])
        self.analysis = analyze(self.program)
        data = list(zip(batches, self.labels, strict=True)) if labels else batches
        self.context = Context(data={"calibration": data})
        self.samples = sum(len(batch[0]) for batch in batches)

    def axis(self, name):
        return self.analysis.axis(name)


def scored(task, axis, name="l2", **options):
    options.setdefault("normalise", "none")
    criterion = Criterion(name=name, samples=task.samples, **options)
    found = task.axis(axis)
    return score(task.program, task.analysis, [found], criterion, task.context)[found]


def hidden(task, run):
    """Return what a module of the model reads, all batches together."""
    seen = []
    handle = run.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in task.batches:
            task.model(*batch)
    handle.remove()
    return torch.cat(seen)
