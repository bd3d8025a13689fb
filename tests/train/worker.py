"""What each process of a distributed test does: trains a small model in several ways."""

import contextlib
import json
import os
import sys
from pathlib import Path

import torch
from torch import distributed, nn

from fxcompress.errors import DataError, FxCompressError, WorkerError
from fxcompress.train import FitConfig, Hooks, fit
from fxcompress.train.metrics import evaluating
from tests.train import joined
from tests.train.trainings import Ending, Killed, batches, net

WAYS = {
    "plain": {},
    "accumulated": {"accumulate": 3, "clip_norm": 0.05, "shuffle": "samples"},
    "masked": {"accumulate": 2, "losses": [{"use": "hard_labels"}, {"use": "soft_labels"}]},
    "masked-once": {"accumulate": 2, "losses": [{"use": "hard_labels"}]},
    "average": {"ema": {"decay": 0.9}, "keep": "best", "snapshot": 3},
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


def trained(way, module, source=None, **kwargs):
    """Train a module; return its weights and history as plain data."""
    told = {"epochs": 2, "optimizer": {"use": "SGD", "lr": 0.2, "momentum": 0.9}, **WAYS[way]}
    teacher = None
    if "soft_labels" in str(told):
        teacher = model()
        with torch.no_grad():
            teacher[0].weight.mul_(2)
    if way == "penalised":
        kwargs["hooks"] = Hooks(
            penalty=lambda module, _: 0.1 * module.get_submodule("0").weight.abs().sum()
        )
    done = fit(module, FitConfig.model_validate(told), source or data(way), seed=4, teacher=teacher,
               evaluate=quality, **kwargs)  # fmt: skip
    weights = {name: t.tolist() for name, t in module.state_dict().items()}
    return {"weights": weights, "history": [each.model_dump() for each in done.history]}


def quality(module):
    pairs = [(x, y) for (x,), y in batches(4, seed=9)]
    x, y = (torch.cat(each) for each in zip(*pairs, strict=True))
    with torch.no_grad(), evaluating(module):
        return -float(nn.functional.cross_entropy(module(x), y))


def killed_and_resumed(folder):
    def die():
        raise Killed

    own = folder if os.environ["RANK"] == "0" else None
    whole = trained("average", model(0.5))
    with contextlib.suppress(DataError):
        trained("average", model(0.5), Ending(data("average"), die, at=10), snapshots=own)
    return [whole, trained("average", model(0.5), snapshots=own)]


def told_different_things():
    try:
        fit(model(), FitConfig(epochs=1 + int(os.environ["RANK"])), data("plain"))
    except WorkerError as error:
        return f"{error}"
    return ""


def main(task, folder):
    distributed.init_process_group("gloo")
    found = {}
    try:
        if task in ("ways", "sharded"):
            found = {way: trained(way, torch.fx.symbolic_trace(model())) for way in WAYS}
            found["norms"] = trained("average", net(dropout=0), batches(4))
            found["fp16"] = joined.trained("fp16")
            found["differs"] = told_different_things()
        if task == "sharded":
            own = os.environ["RANK"] == "0"
            for way in ("taps", "hooked", "peer"):
                found[way] = joined.trained(way, folder / way if own else None)
            found["resumed"] = joined.killed_and_resumed(folder / "kept" if own else None)
        elif task == "ways":
            found["resumed"] = killed_and_resumed(folder / "kept")
        elif task == "dies":
            mine = os.environ["RANK"] == "1"
            source = Ending(data("plain"), lambda: os._exit(9) if mine else None, at=10)
            fit(model(), FitConfig(epochs=2), source)
    except FxCompressError as error:
        print(f"{type(error).__name__}: {error} ({error.reason})", flush=True)
        os._exit(error.exit_code)
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
