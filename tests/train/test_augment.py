"""Augmented images: what each option does, and that runs repeat and resume."""

import pytest
import torch
from torch import nn

from fxcompress.errors import DataError, MissingExtraError
from fxcompress.train import FitConfig, fit
from fxcompress.train._augment import Augmentation
from fxcompress.train.augment_config import Augment
from tests.train.trainings import Killed, killed_at

ALL = {
    "crop": {"scale": [0.5, 1.0]}, "flip": ["horizontal", "vertical"], "rotation": 15,
    "randaugment": {"ops": 2, "magnitude": 9}, "mix": {"classes": 3},
    "jitter": {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.1},
}  # fmt: skip
GREY = {"jitter": {"brightness": 0.2, "contrast": 0.2}}


def images(count=6, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, 8, 8, generator=generator)


def changed(config, x, target=None, seed=0):
    torch.manual_seed(seed)
    (found,), labels = Augmentation(Augment.model_validate(config))((x,), target)
    return found, labels


@pytest.mark.parametrize("name", sorted(set(ALL) - {"mix"}))
@pytest.mark.parametrize("channels", [1, 3])
def test_each_option_changes_images_and_keeps_their_form(name, channels):
    config = {name: GREY.get(name, ALL[name]) if channels == 1 else ALL[name]}
    x = images(channels=channels)
    found, _ = changed(config, x)
    assert found.shape == x.shape
    assert found.dtype == x.dtype
    assert not torch.equal(found, x)
    assert float(found.min()) >= -1e-6
    assert float(found.max()) <= 1 + 1e-6
    again, _ = changed(config, x)
    other, _ = changed(config, x, seed=1)
    assert torch.equal(found, again)
    assert not torch.equal(found, other)


def test_flips_are_those_that_were_asked_for():
    x = images(40)
    found, _ = changed({"flip": ["horizontal"]}, x)
    flipped = [torch.equal(a, b.flip(-1)) for a, b in zip(found, x, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(found, x, strict=True)]
    assert all(a != b for a, b in zip(flipped, kept, strict=True))
    assert 10 < sum(flipped) < 30


def test_rotation_stays_within_its_degrees():
    """A vertical bar through the middle, turned by at most 15 degrees, stays in a cone."""
    x = torch.zeros(20, 1, 33, 33)
    x[..., 16] = 1
    found, _ = changed({"rotation": 15}, x)
    column = torch.arange(33).sub(16).abs()
    reach = (found[:, 0] > 0.1).float() * column
    assert 2 <= float(reach.max()) <= 16 * 0.27 + 1.5


def test_normalised_images_are_varied_as_pixels():
    x, mean, std = images(), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    m, s = (torch.tensor(each).view(1, 3, 1, 1) for each in (mean, std))
    config = {key: ALL[key] for key in ("crop", "jitter", "randaugment")}
    plain, _ = changed(config, x)
    found, _ = changed({**config, "mean": mean, "std": std}, (x - m) / s)
    assert torch.allclose(found, (plain - m) / s, atol=1e-4)


def test_mixing_switches_between_mixup_and_cutmix_three_to_one():
    x = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 8, 8) / 10
    target = torch.tensor([0, 1, 2, 0, 1, 2])
    blended = 0
    for seed in range(200):
        found, labels = changed({"mix": {"classes": 3}}, x, target, seed)
        assert labels.shape == (6, 3)
        assert torch.allclose(labels.sum(1), torch.ones(6))
        flat = found.flatten(1)
        # A blended image is one colour; CutMix leaves two, in the shares of the labels.
        whole = bool((flat.max(1).values - flat.min(1).values).max() < 1e-6)
        blended += whole
        share = labels[1, 1]
        expected = share * x[1].flatten() + (1 - share) * x[0].flatten()
        assert torch.allclose(flat[1].mean(), expected.mean(), atol=1e-4)
    assert 120 < blended < 180


class Watched(nn.Module):
    def __init__(self, seen):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.drop, self.head = nn.Dropout(0.3), nn.Linear(3 * 8 * 8, 3)
        self.seen = seen

    def forward(self, x):
        self.seen.append(x.clone())
        return self.head(self.drop(x.flatten(1)))


@pytest.mark.parametrize("shuffle", ["batches", "samples"])
def test_augmented_runs_repeat_and_resume_to_the_same_bits(tmp_path, shuffle):
    data = [((images(4, seed=n),), torch.tensor([0, 1, 2, n % 3])) for n in range(4)]
    told = FitConfig.model_validate(
        {"epochs": 2, "augment": ALL, "snapshot": 3, "shuffle": shuffle}
    )

    def run(**kwargs):
        seen = []
        module = Watched(seen)
        fit(module, told, data, seed=2, **kwargs)
        return seen, module.head.weight.detach().clone()

    first, weights = run()
    assert not torch.equal(first[0], first[4])
    with pytest.raises(Killed):
        run(snapshots=tmp_path, progress=killed_at(5))
    rest, resumed = run(snapshots=tmp_path)
    assert torch.equal(weights, resumed)
    assert all(torch.equal(a, b) for a, b in zip(first[3:], rest, strict=True))


def test_what_cannot_be_augmented_is_said(monkeypatch):
    with pytest.raises(DataError, match="no images to augment") as caught:
        changed({"flip": ["horizontal"]}, torch.zeros(4, 8))
    assert "(4, 8)" in caught.value.reason
    with pytest.raises(DataError, match="targets cannot be mixed"):
        changed(ALL, images(), None)
    with pytest.raises(DataError, match="none of the 3 classes"):
        changed(ALL, images(), torch.tensor([0, 1, 2, 3, 0, 1]))
    told = {"flip": ["vertical"], "mean": [0.5] * 3, "std": [0.5] * 3}
    with pytest.raises(DataError, match=r"have 1 channels, and `augment\.mean` has 3"):
        changed(told, images(channels=1))
    for wrong in ({"crop": {"scale": [0.9, 0.5]}}, {"mix": {"classes": 3, "share": [0, 0]}},
                  {"mean": [0.5]}, {"rotation": 200}):  # fmt: skip
        with pytest.raises(ValueError, match="1 validation error"):
            FitConfig.model_validate({"epochs": 1, "augment": wrong})
    import sys

    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", None)
    with pytest.raises(MissingExtraError, match="torchvision is not installed"):
        changed({"flip": ["vertical"]}, images())
