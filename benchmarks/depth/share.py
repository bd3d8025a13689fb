"""Cosine of MiniLM's sentence vectors when its layers share tensors: at once, and healed.

python -m benchmarks.depth.share [--heal GLOB] [--render]

Model, data and heal are those of specs/albert. Each row is written to results/depth_share.json
when it is done, and what is there is not run again.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks._common import RESULTS, machine
from fxcompress.ir import Program
from fxcompress.pipeline import Context
from fxcompress.rewrite import GraphRewriter
from fxcompress.spec import Spec, load_data, load_metric, load_program, parse_steps

__all__ = ["GROUPS", "Row", "main", "note", "read", "render"]

SPEC: Final = Path(__file__).parents[2] / "specs" / "albert" / "spec.yaml"
FILE: Final = RESULTS / "depth_share.json"
GROUPS: Final[Mapping[str, Any]] = {
    "two pairs in the middle": [[1, 2], [3, 4]],
    "three pairs": 2,
    "two of three": 3,
}
INITS: Final = ("first", "mean")


@dataclass(frozen=True)
class Row:
    """What came of sharing: mean cosines to the original's vectors, CPU seconds of the heal."""

    groups: str
    init: str
    parameters: int
    cosine: float
    healed: float | None = None
    seconds: float | None = None

    @property
    def key(self) -> str:
        """What `--heal` names."""
        return f"{self.groups}, {self.init}"


class Bench:
    """The captured encoder, its data and the heal of the spec."""

    def __init__(self) -> None:
        spec = Spec.load(SPEC)
        self.program, self.data = load_program(spec), load_data(spec)
        metric = load_metric(spec)
        assert metric is not None, "the spec has a metric"
        self.metric = metric
        self.fit = spec.steps[1]

    def share(self, groups: str, init: str) -> Program:
        """Return the encoder with shared layers."""
        (step,) = parse_steps(
            [{"use": "depth.share_layers", "groups": GROUPS[groups], "init": init}]
        )
        return self._apply(self.program, step)

    def heal(self, program: Program) -> Program:
        """Return it as the spec's training leaves it."""
        return self._apply(program, self.fit)

    def cosine(self, program: Program) -> float:
        """Return the mean cosine to the original's vectors on the split `eval`."""
        value = self.metric.evaluate(
            program.module, {"eval": self.data["eval"]}, self.program.module
        )
        assert value is not None
        return value

    def _apply(self, program: Program, step: Any) -> Program:
        torch.manual_seed(0)
        context = Context(data=self.data, original=self.program)
        decision = step.pass_.decide(program, step.options, context)
        rewriter = GraphRewriter(program)
        with torch.no_grad():
            step.pass_.rewrite(rewriter, decision)
        return rewriter.finish()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.depth.share", description=__doc__)
    parser.add_argument("--heal", action="append", default=[], metavar="GLOB", help="rows to heal")
    parser.add_argument("--render", action="store_true", help="only write the table again")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if not options.render:
        _run(options.heal)
    (RESULTS / "depth_share.md").write_text(render(read()), encoding="utf-8")
    return 0


def _run(heal: Sequence[str]) -> None:
    bench = Bench()
    for groups in GROUPS:
        for init in INITS:
            known = {row.key: row for row in read()}.get(f"{groups}, {init}")
            wanted = any(fnmatch.fnmatch(f"{groups}, {init}", pattern) for pattern in heal)
            if known is not None and (known.healed is not None or not wanted):
                continue
            program = bench.share(groups, init)
            if known is None:
                sizes = [each.numel() for each in program.module.parameters()]
                known = Row(groups, init, sum(sizes), bench.cosine(program))
                note(known)
            if wanted:
                start = time.process_time()
                healed = bench.heal(program)
                seconds = round(time.process_time() - start, 1)
                note(replace(known, healed=bench.cosine(healed), seconds=seconds))


def note(row: Row) -> None:
    """Add a row to the file, or replace it, and print it."""
    rows = {each.key: each for each in read()}
    rows[row.key] = row
    document = {"format_version": "1.0", "rows": [asdict(each) for each in rows.values()]}
    FILE.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(row, flush=True)


def read() -> list[Row]:
    """Return the rows that are written."""
    if not FILE.exists():
        return []
    return [Row(**entry) for entry in json.loads(FILE.read_text(encoding="utf-8"))["rows"]]


def render(rows: Sequence[Row]) -> str:
    """Return the page, from the best."""
    lines = [
        "# MiniLM whose layers share tensors",
        "",
        f"`python -m benchmarks.depth.share` on {machine()}.",
        "",
        "all-MiniLM-L6-v2, six layers of 1.77 M parameters each beside 11.9 M of word vectors:"
        " `depth.share_layers` with two pairs (layers 1 and 2, 3 and 4), three pairs of neighbours,"
        " or two groups of three. Mean cosine of sentence vectors to the original's, on 1,000"
        " sentences of film reviews. Healed: the training of [specs/albert](../../specs/albert/),"
        " the original as teacher, on other sentences without labels; `–` was not run. One seed.",
        "",
        "| groups | tensors of | parameters | cosine | healed | CPU s |",
        "|:--|:--|--:|--:|--:|--:|",
    ]
    for row in sorted(rows, key=lambda row: -row.cosine):
        healed = "–" if row.healed is None else f"{row.healed:.3f}"
        seconds = "–" if row.seconds is None else f"{row.seconds:.0f}"
        lines.append(
            f"| {row.groups} | {row.init} | {row.parameters / 1e6:.1f} M | {row.cosine:.3f} |"
            f" {healed} | {seconds} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
