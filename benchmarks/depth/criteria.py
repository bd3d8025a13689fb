"""Perplexity of SmolLM2-135M with fewer of its 30 layers, by criterion: at once, and healed.

python -m benchmarks.depth.criteria [--only GLOB] [--heal GLOB] [--render]

Each row is written to results/depth_criteria.json when it is done, and what is there is not run
again; `--heal` also trains the rows that fit, in the order given.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks._common import RESULTS, machine
from fxcompress.ir import Program
from fxcompress.pipeline import Context
from fxcompress.rewrite import GraphRewriter
from fxcompress.spec import Spec, load_data, load_metric, load_program, parse_steps

__all__ = ["HEAL", "Candidate", "Row", "candidates", "main", "note", "read", "recovered", "render"]

SPEC = Path(__file__).parents[2] / "specs" / "smollm2" / "spec.yaml"
FILE = RESULTS / "depth_criteria.json"
EVALUATE, CALIBRATION, TRAIN, WINDOW = 12, 8, 64, 256
LAYERS: Final = 30
SHARES: Final = (10, 20)
STEPS: Final = 30
HEAL: Final[dict[str, Any]] = {
    "use": "train.fit",
    "steps": STEPS,
    "teacher": "original",
    "losses": [{"use": "soft_labels", "temperature": 1.0}],
    "optimizer": {"use": "AdamW", "lr": 2e-4, "weight_decay": 0.0},
    "scheduler": {"use": "CosineAnnealingLR", "T_max": "all"},
    "clip_norm": 1.0,
}
SEEDS: Final = 3
ORIGINAL: Final = "original"
_MERGED: Final = {"differences": "merged", "mean": "averaged"}


@dataclass(frozen=True)
class Candidate:
    """One way to lose layers.

    Attributes:
        name: What the table calls it.
        share: How many per cent of the layers go.
        options: Of `depth.skip_blocks`, beside how many; empty where layers are merged.
        formula: Of `depth.merge_layers`, where they are.
        seed: Of the run; only `random` depends on it.
    """

    name: str
    share: int
    options: Mapping[str, Any]
    formula: str = ""
    seed: int = 0

    @property
    def key(self) -> str:
        """The name with the share, `10% NAME`."""
        return f"{self.share}% {self.name}"

    @property
    def count(self) -> int:
        """How many layers go."""
        return LAYERS * self.share // 100


@dataclass(frozen=True)
class Row:
    """What came of a candidate; perplexities on the evaluation windows, CPU seconds."""

    name: str
    share: int
    layers: tuple[int, ...]
    perplexity: float
    seconds: float
    healed: float | None = None
    heal_seconds: float | None = None

    @property
    def key(self) -> str:
        """As of its candidate."""
        return f"{self.share}% {self.name}" if self.share else self.name


def candidates() -> list[Candidate]:
    """Return all of them, in the order of what they cost to measure."""
    found = []
    for share in SHARES:
        found.append(Candidate("block influence", share, {"criterion": "block_influence"}))
        found += [
            Candidate(f"random, seed {seed}", share, {"criterion": "random"}, seed=seed)
            for seed in range(SEEDS)
        ]
        found.append(Candidate("angular distance", share, {"criterion": "angular"}))
        for formula in ("differences", "mean"):
            found.append(
                Candidate(f"the run of angular distance, {_MERGED[formula]}", share, {}, formula)
            )
        found.append(Candidate("Taylor", share, {"criterion": "taylor"}))
        iterative = {"criterion": "block_influence", "iterative": True}
        found.append(Candidate("block influence, one after another", share, iterative))
    found += [Candidate("metric", share, {"criterion": "metric"}) for share in SHARES]
    return found


class Bench:
    """The captured model, its data, and what was ranked so far."""

    def __init__(self) -> None:
        spec = Spec.load(
            SPEC,
            [
                f"data.args.evaluate={EVALUATE}",
                f"data.args.calibration={CALIBRATION}",
                f"data.args.train={TRAIN}",
                f"data.args.window={WINDOW}",
                "data.args.batch=1",
            ],
        )
        self.program = load_program(spec)
        self.data = load_data(spec)
        metric = load_metric(spec)
        assert metric is not None, "the spec has a metric"
        self.metric = metric
        self._decided: dict[tuple[str, int], Any] = {}

    def perplexity(self, program: Program) -> float:
        """Return the metric of a Program on the split `eval`."""
        value = self.metric.evaluate(program.module, {"eval": self.data["eval"]}, None)
        assert value is not None
        return value

    def lose(self, candidate: Candidate, layers: Sequence[int] = ()) -> tuple[Program, list[int]]:
        """Return the model of a candidate, and which of its layers went.

        Args:
            candidate: The way.
            layers: Those to remove, where they are known from before.
        """
        gone = list(layers) or self._chosen(candidate)
        if candidate.options:
            entry: dict[str, Any] = {"use": "depth.skip_blocks", "layers": gone}
        else:
            group = [min(gone) - 1, *gone]
            entry = {"use": "depth.merge_layers", "groups": [group], "formula": candidate.formula}
        return self._apply(self.program, entry, candidate.seed), gone

    def heal(self, program: Program) -> tuple[float, float]:
        """Return the perplexity after a short distillation, and its CPU seconds."""
        start = time.process_time()
        healed = self._apply(program, HEAL, 0)
        seconds = time.process_time() - start
        return self.perplexity(healed), round(seconds, 1)

    def _chosen(self, candidate: Candidate) -> list[int]:
        options = candidate.options
        if not options:
            # n blocks and the one before them become one.
            run = self._skipped({"criterion": "angular"}, candidate.count, 0)
            return run if min(run) else [each + 1 for each in run]
        if options["criterion"] == "angular" or options.get("iterative"):
            return self._skipped(options, candidate.count, candidate.seed)
        scores = {
            block.index: block.score
            for block in self._decision(options, LAYERS * max(SHARES) // 100, candidate.seed).blocks
        }
        order = sorted(scores, key=lambda index: (scores[index], index))
        return sorted(order[: candidate.count])

    def _skipped(self, options: Mapping[str, Any], count: int, seed: int) -> list[int]:
        return [block.index for block in self._decision(options, count, seed).blocks if block.skip]

    def _decision(self, options: Mapping[str, Any], count: int, seed: int) -> Any:
        """Return the decision of `depth.skip_blocks`; the scores do not depend on the count."""
        key = (json.dumps([options, seed]), count)
        if key not in self._decided:
            entry = {"use": "depth.skip_blocks", "count": count, **options}
            entry["calibration"] = CALIBRATION
            (parsed,) = parse_steps([entry])
            torch.manual_seed(seed)
            self._decided[key] = parsed.pass_.decide(
                self.program, parsed.options, self._context(seed)
            )
        return self._decided[key]

    def _apply(self, program: Program, entry: Mapping[str, Any], seed: int) -> Program:
        """Return what a pass makes of a Program, without hashes and proofs."""
        (parsed,) = parse_steps([entry])
        torch.manual_seed(seed)
        decision = parsed.pass_.decide(program, parsed.options, self._context(seed))
        rewriter = GraphRewriter(program)
        with torch.no_grad():
            parsed.pass_.rewrite(rewriter, decision)
        return rewriter.finish()

    def _context(self, seed: int) -> Context:
        return Context(data=self.data, seed=seed, original=self.program, metric=self.metric)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing and write the table."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    if not options.render:
        _run(options.only or ["*"], options.heal)
    (RESULTS / "depth_criteria.md").write_text(render(read()), encoding="utf-8")
    return 0


def _run(only: Sequence[str], heal: Sequence[str]) -> None:
    bench = Bench()
    rows = {row.key: row for row in read()}
    if ORIGINAL not in rows:
        note(Row(ORIGINAL, 0, (), bench.perplexity(bench.program), 0.0))
    for each in candidates():
        if each.key not in rows and _fits(each.key, only):
            start = time.process_time()
            program, layers = bench.lose(each)
            seconds = round(time.process_time() - start, 1)
            note(Row(each.name, each.share, tuple(layers), bench.perplexity(program), seconds))
    for pattern in heal:
        for each in candidates():
            row = {row.key: row for row in read()}.get(each.key)
            if row is None or row.healed is not None or not _fits(each.key, [pattern]):
                continue
            program, _ = bench.lose(each, row.layers)
            healed, seconds = bench.heal(program)
            note(replace(row, healed=healed, heal_seconds=seconds))


def _fits(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatch(key, pattern) for pattern in patterns)


def note(row: Row) -> None:
    """Add a row to the file, or replace it, and print it."""
    rows = {each.key: each for each in read()}
    rows[row.key] = row
    document = {"format_version": "1.0", "rows": [asdict(each) for each in rows.values()]}
    FILE.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    healed = "" if row.healed is None else f", healed {row.healed:.2f} ({row.heal_seconds} s)"
    print(f"{row.key}: {row.perplexity:.2f}{healed} {list(row.layers)}", flush=True)


def read() -> list[Row]:
    """Return the rows that are written."""
    if not FILE.exists():
        return []
    document = json.loads(FILE.read_text(encoding="utf-8"))
    return [Row(**{**entry, "layers": tuple(entry["layers"])}) for entry in document["rows"]]


def recovered(row: Row, original: float) -> float | None:
    """Return which part of the loss in perplexity the heal gave back; None where none was run."""
    if row.healed is None:
        return None
    return (row.perplexity - row.healed) / (row.perplexity - original)


def render(rows: Sequence[Row]) -> str:
    """Return the page: a table for each share, from the best."""
    original = next((row.perplexity for row in rows if row.key == ORIGINAL), float("nan"))
    lines = [
        "# SmolLM2-135M with fewer layers, by criterion",
        "",
        f"`python -m benchmarks.depth.criteria --heal '*'` on {machine()}.",
        "",
        f"Perplexity on {EVALUATE * (WINDOW - 1):,} predictions of newspaper editorials"
        f" ({EVALUATE} windows of {WINDOW} tokens); with all {LAYERS} layers {original:.2f}."
        f" Calibration: {CALIBRATION} other windows. Healed: {STEPS} steps of"
        f" {HEAL['optimizer']['use']} on one window each ({STEPS * WINDOW:,} tokens of other"
        " editorials), the original as teacher, soft labels at temperature 1 and no labels,"
        f" learning rate {HEAL['optimizer']['lr']:g} falling as a cosine. Won back: which part of"
        " the loss in perplexity. Seconds are CPU seconds on one thread, of the choice and of the"
        " heal; `–` was not run.",
        "",
        "Layers of one row are counted from 0. Merged: the run that angular distance chooses"
        " becomes part of the layer before it, `depth.merge_layers` (averaged: with `formula:"
        " mean`). Both shares of a criterion that ranks once share its measurement, which the first"
        " pays.",
    ]
    for share in SHARES:
        count = LAYERS * share // 100
        lines += ["", f"## {count} layers less ({share} %)", ""]
        lines += ["| criterion | layers | perplexity | healed | won back | s | heal s |"]
        lines += ["|:--|:--|--:|--:|--:|--:|--:|"]
        chosen = sorted((row for row in rows if row.share == share), key=_rank)
        lines += [_line(row, original) for row in chosen]
    return "\n".join(lines) + "\n"


def _rank(row: Row) -> float:
    return row.perplexity


def _line(row: Row, original: float) -> str:
    part = recovered(row, original)
    cells = [
        row.name,
        ", ".join(map(str, row.layers)),
        f"{row.perplexity:,.2f}",
        "–" if row.healed is None else f"{row.healed:,.2f}",
        "–" if part is None else f"{part:.0%}",
        f"{row.seconds:.0f}",
        "–" if row.heal_seconds is None else f"{row.heal_seconds:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.depth.criteria", description=__doc__
    )
    parser.add_argument("--only", action="append", default=[], metavar="GLOB", help="rows to run")
    parser.add_argument("--heal", action="append", default=[], metavar="GLOB", help="rows to heal")
    parser.add_argument("--render", action="store_true", help="only write the table again")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
