"""Trainings that processes with a part of the weights do as well: taps, a peer, hooks, fp16."""

from contextlib import suppress
from dataclasses import replace
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from fxcompress.errors import DataError
from fxcompress.ir import capture
from fxcompress.train import FitConfig, Hooks, fit, training_copy
from fxcompress.train.joint import Joining
from fxcompress.train.metrics import evaluating
from tests.train.joint.models import Layer, tapped
from tests.train.trainings import Ending, Killed

SGD = {"use": "SGD", "lr": 0.05, "momentum": 0.9}
KNOWLEDGE = [{"use": "hard_labels"}, {"use": "soft_labels", "temperature": 2}, {"use": "ctkd"}]
TAPS = [*KNOWLEDGE, {"use": "features", "taps": ["h"]}, {"use": "attention_kl", "taps": ["a"]}]
WAYS = {
    "taps": {"losses": TAPS, "ema": {"decay": 0.9}, "accumulate": 2},
    "hooked": {"losses": TAPS, "keep": "best", "epochs": 1},
    "peer": {"losses": KNOWLEDGE, "accumulate": 2, "epochs": 1},
    "fp16": {"losses": TAPS, "precision": "fp16"},
}
SIZES = (4, 3, 1, 4)


class Tied(nn.Module):
    """A language model that reads its embedding twice, and one layer twice."""

    def __init__(self, width):
        super().__init__()
        self.embed, self.scale = nn.Embedding(12, width), nn.Parameter(torch.tensor(1.5))
        self.first, self.second = Layer(width), Layer(width)
        self.drop, self.norm = nn.Dropout(0.4), nn.LayerNorm(width)
        self.head = nn.Linear(width, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.drop(self.first(self.embed(ids)))
        x = self.norm(self.second(self.second(x)))
        return self.scale * self.head(x) + 0.1 * F.linear(x, self.embed.weight)


@cache
def program(width, seed):
    torch.manual_seed(seed)
    model, sizes = Tied(width).eval(), {"ids": {0: "batch"}}
    return capture(model, (torch.ones(2, 5, dtype=torch.long),), dynamic=sizes, verify=False)


def data():
    """Batches that two processes cannot halve, with targets that do not count."""
    generator, found = torch.Generator().manual_seed(0), []
    for place, size in enumerate(SIZES):
        ids = torch.randint(12, (size, 5), generator=generator)
        target = (ids + ids.roll(1, 1)) % 12
        target[0, : place % 3] = -100
        found.append(((ids,), target))
    return found


def quality(module):
    (ids,), target = data()[0]
    with torch.no_grad(), evaluating(module):
        return -float(F.cross_entropy(module(ids).flatten(0, 1), target.flatten()))


def norms(module, _):
    return 0.02 * sum(parameter.norm() for parameter in module.parameters())


def centred(module, _):
    """Take the mean over all rows from the gradient of each matrix: a part has other rows."""
    for tensor in module.parameters():
        if tensor.grad is not None and tensor.dim() == 2:
            tensor.grad.sub_(tensor.grad.mean(0))


def smallest_gone(module, _):
    """Write zeros for the fifth of each matrix that is smallest."""
    for tensor in module.parameters():
        if tensor.dim() == 2:
            tensor.mul_(tensor.abs() > tensor.abs().flatten().kthvalue(tensor.numel() // 5).values)


def trained(way, folder=None, source=None, dropout=0.0):
    """Train; return weights and history as plain data."""
    student = tapped(program(8, 0), ("h", "norm"), ("a", "first", "attention"))
    teacher, module = program(12, 1), training_copy(student)
    told = {"epochs": 2, "optimizer": SGD, "clip_norm": 0.5, **WAYS[way]}
    peer = training_copy(teacher) if way == "peer" else None
    learned = {"model": module, **({} if peer is None else {"peer": peer})}
    for each in learned.values():
        each.get_submodule("drop").p = dropout
    joins = None if peer else Joining(replace(student, module=module), teacher, seed=4)
    hooks = Hooks(norms, centred, smallest_gone) if way == "hooked" else None
    done = fit(module, FitConfig.model_validate(told), source or data(), seed=4, joining=joins,
               peer=peer, snapshots=folder, evaluate=quality, hooks=hooks)  # fmt: skip
    return {
        "weights": {f"{name}.{key}": tensor.tolist() for name, each in learned.items()
                    for key, tensor in each.state_dict().items()},
        "history": [each.model_dump() for each in done.history],
    }  # fmt: skip


def killed_and_resumed(folder):
    """Return what a whole run came to, and one that went on after it was killed."""

    def die():
        raise Killed

    whole = trained("taps", dropout=0.4)
    with suppress(DataError):
        trained("taps", folder, Ending(data(), die, at=6), dropout=0.4)
    return [whole, trained("taps", folder, dropout=0.4)]
