"""What each step of specs/distill_chain is worth: the chain, shortened, with steps removed.

python -m benchmarks.train.chain [--seeds 1] [--images 4000] [--render]

All rows train on the same part of the images. Steps that rows have in common run once. Each row is
written when it is done, and is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import yaml

import fxcompress as fxc
from benchmarks._common import RESULTS, machine
from benchmarks.quantize.dynamic import SPECS, load
from benchmarks.train._images import CASES, Batch, accuracy
from benchmarks.train._runs import Runs, spread, table
from fxcompress.analysis import cost

NAME: Final = "train_chain"
SPEC: Final = SPECS / "distill_chain" / "spec.yaml"
BATCH: Final = 50
TEST: Final = 5000
Steps = list[dict[str, Any]]


def without(*ids: str) -> Callable[[Steps], Steps]:
    """Return a change that leaves steps out."""
    return lambda steps: [step for step in steps if step["id"] not in ids]


def labels_alone(steps: Steps) -> Steps:
    """Train every step on labels, with no teacher."""
    for step in without("taps")(steps):
        if step["use"] == "train.fit":
            step["losses"] = [{"use": "hard_labels"}]
            del step["teacher"]
    return without("taps")(steps)


def no_maps(steps: Steps) -> Steps:
    """Leave the attention maps out of the losses."""
    for step in steps:
        kept = [each for each in step.get("losses", ()) if each["use"] != "attention_transfer"]
        if kept:
            step["losses"] = kept
    return without("taps")(steps)


def after_training(steps: Steps) -> Steps:
    """Quantise what is trained already, by observers alone."""
    static = {"use": "quantize.static", "id": "int8", "target": "onnxruntime", "calibration": 500}
    return [*without("int8", "settle")(steps), static]


ROWS: Final[Mapping[str, Callable[[Steps], Steps]]] = {
    "the whole chain": lambda steps: steps,
    "labels alone, no teacher": labels_alone,
    "labels and soft labels, no attention maps": no_maps,
    "no `distil`: pruned as it was cut": without("distil"),
    "no `heal`": without("heal"),
    "no `settle`: quantizers as calibrated": without("settle"),
    "no `heal`, no `settle`": without("heal", "settle"),
    "`quantize.static` instead of `int8` and `settle`": after_training,
    "no `prune`, no `heal`": without("prune", "heal"),
    "no `int8`, no `settle`": without("int8", "settle"),
}


@dataclass(frozen=True)
class Part:
    """Batches of some images, all of them drawn anew each time."""

    images: torch.Tensor
    classes: torch.Tensor

    def __len__(self) -> int:
        return len(self.images) // BATCH

    def __iter__(self) -> Any:
        for index in torch.randperm(len(self.images)).split(BATCH)[: len(self)]:
            yield (self.images[index],), self.classes[index]


class Chain:
    """Runs variants of the chain, what they have in common once.

    Args:
        images: How many are trained on.
        seed: Says which, and the order.
    """

    def __init__(self, images: int, seed: int) -> None:
        self.seed = seed
        data = load("fashion_mnist/data")
        x, y = data.load(data.find_root(), "train")
        chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        few, calibration = chosen[:images], chosen[:500]
        self.data = {
            "train": Part(x[few], y[few]),
            "calibration": [((x[calibration],), y[calibration])],
        }
        x, y = data.load(data.find_root(), "t10k")
        self.test: list[Batch] = list(data.Batches(x[:TEST], y[:TEST], 500))
        task = CASES["fashion"]
        self.original = fxc.capture(
            task.teacher(), (torch.zeros(task.shape),), dynamic={"x": {0: "batch"}}
        )
        self.made: dict[str, fxc.Program] = {}

    def run(self, row: str) -> dict[str, Any]:
        """Run a variant; return its accuracy, bytes and multiply-accumulates."""
        start = time.process_time()
        spec = yaml.safe_load(SPEC.read_text(encoding="utf-8"))
        steps = [_given(copy.deepcopy(step)) for step in spec["passes"]]
        program = self._after(ROWS[row](steps))
        seconds = time.process_time() - start
        program.module.eval()
        spent, before = cost(program), cost(self.original)
        return {
            "original": accuracy(self.original.module, self.test),
            "accuracy": accuracy(program.module, self.test),
            "bytes": spent.bytes,
            "of the bytes": spent.bytes / before.bytes,
            "of the macs": spent.macs / before.macs,
            "images": len(self.data["train"]) * BATCH,
            "seconds": round(seconds, 1),
        }

    def _after(self, steps: Sequence[Mapping[str, Any]]) -> fxc.Program:
        if not steps:
            return self.original
        key = json.dumps(steps)
        if key not in self.made:
            before = self._after(steps[:-1])
            done = fxc.compress(
                before, [steps[-1]], data=self.data, seed=self.seed, teacher=self.original
            )
            self.made[key] = done.program
        return self.made[key]


def _given(step: dict[str, Any]) -> dict[str, Any]:
    """Name the teacher: steps run one by one, and `original` would be what the last one left."""
    return {**step, "teacher": "given"} if "teacher" in step or "taps" in step else step


def render(runs: Runs) -> str:
    """Return the page."""
    rows = []
    whole = {row["seed"]: row["accuracy"] for row in runs.where(row="the whole chain")}
    for name in ROWS:
        found = list(runs.where(row=name))
        if not found:
            continue
        mean = {key: statistics.mean(each[key] for each in found) for key in
                ("of the bytes", "of the macs", "original", "accuracy", "bytes")}  # fmt: skip
        apart = statistics.mean(each["accuracy"] - whole[each["seed"]] for each in found)
        rows.append([
            name,
            spread([each["accuracy"] for each in found]),
            "" if name == "the whole chain" else f"{apart:+.2f}",
            f"{100 * mean['accuracy'] / mean['original']:.1f} %",
            f"{mean['bytes'] / 1000:.1f} kB",
            f"{100 * mean['of the bytes']:.1f} %",
            f"{100 * mean['of the macs']:.0f} %",
        ])  # fmt: skip
    header = ("", "accuracy", "to the chain", "of the original", "tensors", "of the bytes",
              "of the MACs")  # fmt: skip
    some = next(iter(runs.rows), {"original": 0.0, "images": 0})
    seeds = "one seed" if len(whole) == 1 else f"{len(whole)} seeds"
    return "\n".join([
        "# The chain of specs/distill_chain, step by step",
        "",
        f"`python -m benchmarks.train.chain` on {machine()}.",
        "",
        NOTES.format(**some, test=TEST, batch=BATCH, seeds=seeds),
        "",
        *table(header, rows),
        "",
    ])  # fmt: skip


NOTES: Final = (
    "Shortened: the spec's steps, options and epochs, but {images:,} of the 60,000 training images"
    " in batches of {batch} (of 250), so every row has 15 times fewer images and 3 times fewer"
    " steps, and loses more than the spec does (99.9 % of the accuracy in 9.5 % of the bytes, see"
    " its README). Accuracy of the first {test:,} test images; the original has {original:.2f} %."
    " What is removed is not trained longer elsewhere. Tensors as stored."
    "\n\n"
    "The teacher is worth most, then healing after pruning; one of `heal` and `settle` must be"
    " there. At this length the attention maps, training the student before it is pruned, and"
    " quantizers that train change the accuracy by 0.2 points at most, which {seeds} cannot tell"
    " from noise. Scores of a trained student do leave a cheaper network at the same size."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--render", action="store_true", help="only write the page again")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    runs = Runs(NAME)
    for seed in range(options.seeds) if not options.render else ():
        named = [{"row": row, "seed": seed} for row in ROWS]
        if all(any(runs.where(**each)) for each in named):
            continue
        chain = Chain(options.images, seed)
        for each in named:
            runs.once(each, lambda each=each, chain=chain: chain.run(each["row"]))
    (RESULTS / f"{NAME}.md").write_text(render(runs), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
