"""What the tests of the training loop share: a small network, its data, and a way to kill it."""

import pytest
import torch
from torch import nn

from fxcompress.train import FitConfig, fit


def net(dropout=0.2):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(6, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(16, 3, bias=False),
        )  # fmt: skip


def batches(count=6, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count * size, 6, generator=generator)
    y = (x @ torch.randn(6, 3, generator=generator)).argmax(1)
    return [((a,), b) for a, b in zip(x.split(size), y.split(size), strict=True)]


def config(**options):
    return FitConfig.model_validate({"epochs": 2, **options})


def bits(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


class Killed(Exception):
    pass


class Ending(list):
    """Data whose reading ends one process, or all of them, in a batch."""

    def __init__(self, items, end, at):
        super().__init__(items)
        self.end, self.left = end, at

    def __iter__(self):
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, place):
        self.left -= 1
        if not self.left:
            self.end()
        return super().__getitem__(place)


def killed_at(step):
    def report(text, done, total):
        if done == step:
            raise Killed

    return report


def whole_and_resumed(tmp_path, options, at, **kwargs):
    whole = net()
    expected = fit(whole, config(**options), batches(), seed=3, **kwargs)
    with pytest.raises(Killed):
        fit(net(), config(**options), batches(), seed=3, snapshots=tmp_path,
            progress=killed_at(at), **kwargs)  # fmt: skip
    assert list(tmp_path.glob("step-*"))
    resumed = net()
    # What the caller drew meanwhile must not matter.
    torch.rand(17)
    found = fit(resumed, config(**options), batches(), seed=3, snapshots=tmp_path, **kwargs)
    assert found.history == expected.history
    assert (found.best, found.kept) == (expected.best, expected.kept)
    return bits(whole), bits(resumed)
