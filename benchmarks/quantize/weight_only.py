"""Perplexity of SmolLM2-135M with weights of few bits, by method and beside peers.

python -m benchmarks.quantize.weight_only [--only GLOB] [--render]

Each row is written to results/quantize_weight_only.json when it is done, and what is there is not
run again. Rows of a peer need its package (see `_peers.py`); without it they are left out.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks._common import RESULTS, machine
from benchmarks.quantize import _peers
from fxcompress.analysis.cost import cost
from fxcompress.ir import Program
from fxcompress.pipeline import Context
from fxcompress.rewrite import GraphRewriter
from fxcompress.spec import Spec, load_data, load_metric, load_program, parse_steps
from fxcompress.spec.load_model import build_model

__all__ = ["Candidate", "Row", "candidates", "main", "read", "recovered", "render"]

SPEC = Path(__file__).parents[2] / "specs" / "smollm2" / "spec.yaml"
FILE = RESULTS / "quantize_weight_only.json"
EVALUATE, CALIBRATION, WINDOW = 18, 32, 512
FORMATS: Final = ((4, 64), (4, 128), (3, 64), (3, None))


@dataclass(frozen=True)
class Candidate:
    """One way to quantise: what the table calls it, its format, and the pass's other options."""

    method: str
    bits: int
    group: int | None
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What the table and `--only` call it."""
        group = "channel" if self.group is None else f"g{self.group}"
        return f"int{self.bits} {group} {self.method}"


@dataclass(frozen=True)
class Row:
    """What came of a candidate: perplexity on the evaluation windows, stored bytes, CPU s."""

    name: str
    method: str
    bits: int
    group: int | None
    perplexity: float
    bytes: int | None
    seconds: float


def candidates() -> list[Candidate]:
    """Return all of them, the peers last."""
    nearest = {"method": "rtn", "search": "minmax"}
    found = [
        Candidate("rtn", 8, None, {**nearest, "symmetric": True}),
        Candidate("rtn", 8, 64, nearest),
    ]
    for bits, group in FORMATS:
        found += [
            Candidate("rtn", bits, group, nearest),
            Candidate("rtn, mse", bits, group, {"method": "rtn", "search": "mse"}),
            Candidate("hqq", bits, group, {"method": "hqq"}),
            Candidate("awq", bits, group, {"method": "awq"}),
            Candidate("gptq", bits, group, {"method": "gptq"}),
            Candidate("awq+gptq", bits, group, {"method": "awq+gptq"}),
        ]
    # torchao's groups must divide a row, and nncf has no 3 bits outside OpenVINO.
    peers = [
        (name, *each)
        for name in _peers.NAMES
        for each in FORMATS
        if not (name == "torchao" and each[1] == 128) and not (name == "nncf" and each[0] == 3)
    ]
    return found + [Candidate(name, bits, group, {}) for name, bits, group in peers]


class Bench:
    """The captured model and its data."""

    def __init__(self) -> None:
        sizes = {"evaluate": EVALUATE, "calibration": CALIBRATION, "train": 0, "batch": 1}
        spec = Spec.load(SPEC, [f"data.args.{name}={value}" for name, value in sizes.items()])
        self.build = partial(build_model, spec)
        self.program = load_program(spec)
        self.data = load_data(spec)
        metric = load_metric(spec)
        assert metric is not None, "the spec has a metric"
        self.metric = metric

    def perplexity(self, module: torch.nn.Module) -> float:
        """Return the metric of a module on the split `eval`."""
        value = self.metric.evaluate(module, {"eval": self.data["eval"]}, None)
        assert value is not None
        return value

    def run(self, candidate: Candidate) -> Row | None:
        """Return the figures of a candidate; None where its peer is not installed."""
        start = time.process_time()
        if candidate.method in _peers.NAMES:
            batches: list[Any] = [batch for batch, _ in self.data["calibration"]]
            module = _peers.quantise(
                candidate.method, self.build, candidate.bits, candidate.group, batches
            )
            if module is None:
                return None
            size = None
        else:
            program = self.quantise(candidate)
            module, size = program.module, cost(program).bytes
        seconds = time.process_time() - start
        form = (candidate.method, candidate.bits, candidate.group)
        return Row(candidate.name, *form, self.perplexity(module), size, round(seconds, 1))

    def quantise(self, candidate: Candidate) -> Program:
        """Return what the pass makes of the model, without hashes and proofs."""
        entry = {
            "use": "quantize.weight_only",
            "bits": candidate.bits,
            "group": candidate.group,
            "calibration": CALIBRATION,
            **candidate.options,
        }
        (parsed,) = parse_steps([entry])
        torch.manual_seed(0)
        context = Context(data=self.data, original=self.program)
        decision = parsed.pass_.decide(self.program, parsed.options, context)
        rewriter = GraphRewriter(self.program)
        with torch.no_grad():
            parsed.pass_.rewrite(rewriter, decision)
        return rewriter.finish()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the candidates that are missing and write the table."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    rows = {row.name: row for row in read()}
    if not options.render:
        _run(rows, options.only or ["*"])
    (RESULTS / "quantize_weight_only.md").write_text(render(list(rows.values())), encoding="utf-8")
    return 0


def _run(rows: dict[str, Row], only: Sequence[str]) -> None:
    bench = Bench()
    if "float32" not in rows:
        size = cost(bench.program).bytes
        perplexity = bench.perplexity(bench.program.module)
        _note(rows, Row("float32", "", 32, None, perplexity, size, 0.0))
    for each in candidates():
        wanted = any(fnmatch.fnmatch(each.name, pattern) for pattern in only)
        if wanted and each.name not in rows:
            row = bench.run(each)
            if row is not None:
                _note(rows, row)


def _note(rows: dict[str, Row], row: Row) -> None:
    # Several processes may fill in one table.
    rows.update({each.name: each for each in read()})
    rows[row.name] = row
    document = {"format_version": "1.0", "rows": [asdict(each) for each in rows.values()]}
    FILE.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"{row.name}: {row.perplexity:.2f}, {row.bytes} bytes, {row.seconds} s", flush=True)


def read() -> list[Row]:
    """Return the rows that are written."""
    if not FILE.exists():
        return []
    return [Row(**entry) for entry in json.loads(FILE.read_text(encoding="utf-8"))["rows"]]


def recovered(row: Row, rows: Mapping[str, Row]) -> float | None:
    """Return the part of the loss of rounding to nearest that a row wins back."""
    group = "channel" if row.group is None else f"g{row.group}"
    original, nearest = rows.get("float32"), rows.get(f"int{row.bits} {group} rtn")
    if original is None or nearest is None or row.bits > 4:
        return None
    return (nearest.perplexity - row.perplexity) / (nearest.perplexity - original.perplexity)


def render(rows: Iterable[Row]) -> str:
    """Return the page: the original, then by format from the best."""
    named = {row.name: row for row in rows}
    ordered = sorted(named.values(), key=lambda r: (-r.bits, r.group or 0, r.perplexity))
    lines = [
        "# SmolLM2-135M with weights of few bits",
        "",
        f"`python -m benchmarks.quantize.weight_only` on {machine()}.",
        "",
        f"Perplexity on {EVALUATE * (WINDOW - 1):,} predictions of newspaper editorials"
        f" ({EVALUATE} windows of {WINDOW} tokens); calibration on {CALIBRATION} other windows."
        " All 210 linear layers are quantised; the table of words, which is also the output layer,"
        " stays in float32 (113 MB of the bytes). `rtn` covers the range of every group; `rtn, mse`"
        " clips it for the least squared error. Won back: the part of the loss of `rtn` in the same"
        " format. Seconds are CPU seconds of one thread for quantising.",
        "",
        "The weights of this model already lie on a 4-bit grid in groups of 32, so that size is"
        " left out. Groups of 128 do not divide its rows of 576: the last group of such a row has"
        " 64 elements here; torchao refuses them. nncf is asked for AWQ and scale estimation on the"
        " same windows; it has no 3 bits for PyTorch models. Rows that are missing were not"
        " measured; gptqmodel was not, since it did not end within half an hour.",
        "",
        "| weights | method | perplexity | against float | won back | MB | s |",
        "|:--|:--|--:|--:|--:|--:|--:|",
    ]
    original = named.get("float32")
    for row in ordered:
        back = recovered(row, named)
        against = "" if original is None else f"{row.perplexity / original.perplexity - 1:+.1%}"
        size = "–" if row.bytes is None else f"{row.bytes / 1e6:.0f}"
        label = row.name.removesuffix(row.method).strip()
        lines.append(
            f"| {label} | {row.method or '–'} | {row.perplexity:,.2f} | {against} |"
            f" {'–' if back is None else f'{back:.0%}'} | {size} | {row.seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantize.weight_only", description=__doc__
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="GLOB", help="names of candidates"
    )
    parser.add_argument("--render", action="store_true", help="only write the table again")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
