"""Factorised kernels and shared weights on trained ResNets: at once, and healed.

python -m benchmarks.factorize.kernels [--only GLOB] [--render]

Each row is written to results/factorize_kernels.json when it is done, and what is there is not run
again. Fashion-MNIST is evaluated on 2,000 images and healed on 5,000. The peer for codebooks is
KMeans of scikit-learn, on the same weights with as many clusters.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch

from benchmarks._common import RESULTS, interleaved, machine, median
from benchmarks.quantize._rounded import SPECS
from fxcompress.analysis import cost
from fxcompress.emit import emit
from fxcompress.ir import Program
from fxcompress.pipeline import Context
from fxcompress.rewrite import GraphRewriter
from fxcompress.spec import Spec, load_data, load_metric, load_program, parse_steps

__all__ = ["METHODS", "Bench", "Row", "main", "render"]

FILE = RESULTS / "factorize_kernels.json"
HEAL: Final[dict[str, Any]] = {
    "use": "train.fit",
    "epochs": 3,
    "teacher": "original",
    "losses": [
        {"use": "hard_labels", "weight": 0.5},
        {"use": "soft_labels", "weight": 0.5, "temperature": 4},
    ],
    "optimizer": {"use": "SGD", "lr": 0.02, "momentum": 0.9, "nesterov": True},
    "scheduler": {"use": "CosineAnnealingLR", "T_max": "all"},
    "clip_norm": 1.0,
}
MODELS: Final = {"digits": 1200, "fashion_mnist": 5000}
_KERNELS: Final = {"types": ["conv2d"]}
METHODS: Final[Mapping[str, Mapping[str, Any]]] = {
    "svd, half of the MACs": {"use": "factorize.svd", "budget": {"macs": "50%"}, **_KERNELS},
    "tucker, half of the MACs": {"use": "factorize.tucker", "budget": {"macs": "50%"}},
    "tucker, VBMF": {"use": "factorize.tucker", "vbmf": True},
    "cp, half of the weights": {"use": "factorize.cp", "ratio": "50%"},
    "cp, separable kernels": {"use": "factorize.cp", "ratio": "50%", "separable": True},
    "depthwise, half of the MACs": {"use": "factorize.depthwise", "budget": {"macs": "50%"}},
    "depthwise, m = 1": {"use": "factorize.depthwise", "multiplier": 1},
    "depthwise, m = 1, of weights": {
        "use": "factorize.depthwise",
        "multiplier": 1,
        "whiten": "none",
    },
    "depthwise, m = 2": {"use": "factorize.depthwise", "multiplier": 2},
    "share_weights, 16 values": {"use": "factorize.share_weights", "entries": 16},
    "share_weights, 8 values": {"use": "factorize.share_weights", "entries": 8},
    "share_weights, 4 values": {"use": "factorize.share_weights", "entries": 4},
    "4 values for 8 channels": {"use": "factorize.share_weights", "entries": 4, "rows": 8},
}
# What codebooks are compared with, at the same bits for a weight.
_UNIFORM: Final = {
    "integers of 4 bits, a scale for each channel": {
        "use": "quantize.weight_only",
        "bits": 4,
        "group": None,
    },
    "integers of 2 bits, a scale for each channel": {
        "use": "quantize.weight_only",
        "bits": 2,
        "group": None,
    },
}


@dataclass(frozen=True)
class Row:
    """What a method makes of a model: accuracy, costs of the result and CPU seconds."""

    model: str
    method: str
    accuracy: float
    parameters: int
    bytes: int
    macs: int
    file: int
    ratio: float
    seconds: float
    healed: float | None = None
    peer: float | None = None
    own: float | None = None

    @property
    def key(self) -> str:
        """The name of the row."""
        return f"{self.model}: {self.method}"


class Bench:
    """A trained model of the examples, with its data."""

    def __init__(self, name: str) -> None:
        self.name = name
        spec = Spec.load(SPECS / name / "spec.yaml")
        data = dict(load_data(spec))
        if name == "fashion_mnist":
            data["eval"] = list(islice(data["eval"], 8))
            data["train"] = list(islice(data["train"], MODELS[name] // 250))
        self.data = data
        metric = load_metric(spec)
        assert metric is not None, "the example has a metric"
        self.metric = metric
        self.program = load_program(spec)

    def run(self, program: Program, entry: Mapping[str, Any]) -> Program:
        """Return what a pass makes of a Program."""
        (step,) = parse_steps([dict(entry)])
        torch.manual_seed(0)
        context = Context(data=self.data, original=self.program, metric=self.metric)
        decision = step.pass_.decide(program, step.options, context)
        rewriter = GraphRewriter(program)
        step.pass_.rewrite(rewriter, decision)
        return rewriter.finish()

    def accuracy(self, program: Program) -> float:
        """Return the metric on the split `eval`."""
        value = self.metric.evaluate(program.module, {"eval": self.data["eval"]}, None)
        assert value is not None, "the split is there"
        return float(value)

    def row(self, method: str, entry: Mapping[str, Any] | None) -> tuple[Row, Program]:
        """Measure one method."""
        start = time.process_time()
        made = self.program if entry is None else self.run(self.program, entry)
        seconds = time.process_time() - start
        costs = cost(made)
        size, ratio = self.onnx(made)
        row = Row(
            self.name, method, self.accuracy(made), costs.parameters, costs.bytes,
            costs.macs // max(costs.dims.get("batch", 1), 1), size, ratio, seconds,
        )  # fmt: skip
        return row, made

    def onnx(self, program: Program) -> tuple[int, float]:
        """Return the bytes of the ONNX file, and its time for 32 images over that of the model."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        size = 28 if self.name == "fashion_mnist" else 8
        feed = {"x": torch.randn(32, 1, size, size).numpy()}
        with TemporaryDirectory() as folder:
            calls, sizes = {}, {}
            for name, each in (("original", self.program), ("result", program)):
                (artefact,) = emit(each, Path(folder) / name, ["onnx"])
                session = onnxruntime.InferenceSession(
                    str(artefact.paths[0]), options, providers=["CPUExecutionProvider"]
                )
                calls[name] = lambda session=session: session.run(None, feed)
                sizes[name] = artefact.bytes
            times = interleaved(calls, 40, warmup=3)
        return sizes["result"], median(times["result"]) / median(times["original"])

    def clusters(self, made: Program) -> tuple[float, float]:
        """Return the squared error of shared weights, of KMeans of scikit-learn and of ours."""
        from sklearn.cluster import KMeans

        theirs = ours = 0.0
        state, shared = self.program.state(), made.state()
        for name, module in made.module.named_modules():
            if not hasattr(module, "anchors") or module.axis is not None:
                continue
            layer = name.removesuffix("_weight_codebook")
            tensor = f"{layer}.weight"
            if tensor not in state:
                continue
            values = state[tensor].detach().reshape(-1, 1).double()
            start = KMeans(module.entries, n_init=10, random_state=0).fit(values.numpy())
            theirs += float(start.inertia_)
            ours += float(
                (shared[tensor].detach() - state[tensor].detach()).double().square().sum()
            )
        return theirs, ours


def read() -> dict[str, Row]:
    """Return the rows that were measured, by key."""
    if not FILE.exists():
        return {}
    rows = [Row(**each) for each in json.loads(FILE.read_text())["rows"]]
    return {row.key: row for row in rows}


def _note(rows: Mapping[str, Row]) -> None:
    document = {"machine": machine(), "rows": [asdict(row) for row in rows.values()]}
    FILE.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def main(only: str = "*") -> None:
    """Measure what is missing, and write the table."""
    rows = read()
    methods: dict[str, Mapping[str, Any] | None] = {"original": None, **METHODS, **_UNIFORM}
    for name in MODELS:
        bench: Bench | None = None
        for method, entry in methods.items():
            key = f"{name}: {method}"
            if key in rows or not fnmatch.fnmatch(key, only):
                continue
            bench = bench or Bench(name)
            row, made = bench.row(method, entry)
            if entry is not None and method not in _UNIFORM:
                row = replace(row, healed=bench.accuracy(bench.run(made, HEAL)))
            if method.startswith("share_weights"):
                theirs, ours = bench.clusters(made)
                row = replace(row, peer=theirs, own=ours)
            rows[key] = row
            _note(rows)
            print(row, flush=True)
    render(rows.values())


def render(rows: Iterable[Row]) -> None:
    """Write the tables of what was measured."""
    known = list(rows)
    lines = [
        "# Factorised kernels and shared weights",
        "",
        f"`python -m benchmarks.factorize.kernels` on {machine()}.",
        "",
        "Healed: three epochs on labels and soft labels of the "
        "original (digits 1,200 images, Fashion-MNIST 5,000 of 60,000). Accuracy on 597 digits, "
        "and on 2,000 of the 10,000 test images of Fashion-MNIST: a point is 6 and 20 images. One "
        "seed. Time: 32 images in onnxruntime on one thread, in turns with the original. Bytes "
        "are those of the Program's tensors; in ONNX an index takes a byte.",
    ]
    for model in MODELS:
        mine = [row for row in known if row.model == model]
        if not mine:
            continue
        base = next((row for row in mine if row.method == "original"), mine[0])
        lines += [
            "",
            f"## {model}",
            "",
            "| method | accuracy | healed | parameters | bytes | MACs | ONNX file | time |",
            "|:--|--:|--:|--:|--:|--:|--:|--:|",
        ]
        lines += [_line(row, base) for row in mine]
        known_methods = {row.method for row in mine}
        missing = [each for each in (*METHODS, *_UNIFORM) if each not in known_methods]
        if missing:
            lines += ["", f"Not measured yet: {', '.join(missing)}."]
        compared = [row for row in mine if row.peer is not None and row.own is not None]
        if compared:
            errors = (
                f"{row.method.removeprefix('share_weights, ')} "
                f"{(row.own or 0.0) / (row.peer or 1.0):.4f}"
                for row in compared
            )
            lines += [
                "",
                "Squared error of the weights, over that of KMeans of scikit-learn (ten starts): "
                f"{', '.join(errors)}.",
            ]
    (RESULTS / "factorize_kernels.md").write_text("\n".join(lines) + "\n")


def _line(row: Row, base: Row) -> str:
    healed = "" if row.healed is None else f"{row.healed:.2%}"
    cells = [
        row.method,
        f"{row.accuracy:.2%}",
        healed,
        f"{row.parameters / base.parameters:.0%}",
        f"{row.bytes / base.bytes:.0%}",
        f"{row.macs / base.macs:.0%}",
        f"{row.file / base.file:.0%}",
        f"{row.ratio:.2f} ×",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*", help="Keys of rows to run, as a glob.")
    parser.add_argument("--render", action="store_true", help="Write the table of what is there.")
    given = parser.parse_args()
    if given.render:
        render(read().values())
    else:
        main(given.only)
