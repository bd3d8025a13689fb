"""What each process of a distributed test does: trains a small model in several ways."""

import contextlib
import json
import os
import sys
from pathlib import Path

import torch
from torch import distributed, nn

from fxcompress.errors import FxCompressError
from fxcompress.train import FitConfig, Hooks, fit
from tests.train.trainings import Killed, batches

WAYS = {
    "plain": {},
    "accumulated": {"accumulate": 3, "clip_norm": 0.05},
    "masked": {"accumulate": 2, "losses": [{"use": "hard_labels"}, {"use": "soft_labels"}]},
    "masked-once": {"accumulate": 2, "losses": [{"use": "hard_labels"}]},
    "average": {"ema": {"decay": 0.9}, "keep": "best", "shuffle": "samples"},
    "penalised": {"groups": [{"targets": ["*.bias"], "scale": 0.5}]},
}
SIZES = (8, 7, 1, 3, 8, 2, 8, 5)


def model(dropout=0.0):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3, bias=False)
        )


def data(way):
    """Batches that two processes cannot halve; one has a single sample."""
    found = [((x[:n],), y[:n]) for ((x,), y), n in zip(batches(8), SIZES, strict=True)]
    if way.startswith("masked"):
        for place, (_, target) in enumerate(found):
            target[: 1 + place % 3] = -100
    return found


def trained(way, module, **kwargs):
    """Train a module; return its weights and history as plain data."""
    told = {"epochs": 2, "optimizer": {"use": "SGD", "lr": 0.2, "momentum": 0.9}, **WAYS[way]}
    teacher = None
    if "soft_labels" in str(told):
        teacher = model()
        with torch.no_grad():
            teacher[0].weight.mul_(2)
    if way == "penalised":
        kwargs["hooks"] = Hooks(penalty=lambda module, _: 0.1 * module[0].weight.abs().sum())
    done = fit(module, FitConfig.model_validate(told), data(way), seed=4, teacher=teacher,
               evaluate=quality, **kwargs)  # fmt: skip
    weights = {name: t.tolist() for name, t in module.state_dict().items()}
    return {"weights": weights, "history": [each.model_dump() for each in done.history]}


def quality(module):
    pairs = [(x, y) for (x,), y in batches(4, seed=9)]
    x, y = (torch.cat(each) for each in zip(*pairs, strict=True))
    with torch.no_grad():
        return -float(nn.functional.cross_entropy(module(x), y))


def killed_and_resumed(folder):
    def die(module, moment):
        if moment.step == 9:
            raise Killed

    whole = trained("plain", model(0.5))
    own = folder if os.environ["RANK"] == "0" else None
    with contextlib.suppress(Killed):
        trained("plain", model(0.5), snapshots=own, hooks=Hooks(after_step=die))
    return [whole, trained("plain", model(0.5), snapshots=own)]


class Dying(list):
    """Data whose reading ends one process, without a word, in its fifth batch."""

    def __iter__(self):
        for place, item in enumerate(super().__iter__()):
            if place == 4 and os.environ["RANK"] == "1":
                os._exit(9)
            yield item


def main(task, folder):
    distributed.init_process_group("gloo")
    found = {}
    try:
        if task == "ways":
            found = {way: trained(way, model()) for way in WAYS}
            found["resumed"] = killed_and_resumed(folder / "kept")
        elif task == "dies":
            fit(model(), FitConfig(epochs=1, shuffle="none"), Dying(data("plain")))
        elif task == "differs":
            fit(model(), FitConfig(epochs=1 + int(os.environ["RANK"])), data("plain"))
    except FxCompressError as error:
        print(f"{type(error).__name__}: {error} ({error.reason})", flush=True)
        os._exit(error.exit_code)
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
