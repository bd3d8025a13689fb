"""Perplexity of SmolLM2-135M with 20 % fewer parameters, by criterion: at once, and after a heal.

python -m benchmarks.prune.smollm2 [--only GLOB] [--heal NAME] [--render]

Each candidate is written to results/prune_smollm2.json when it is done, and what is there is not
run again.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks._common import RESULTS, machine
from fxcompress.axes import analyze
from fxcompress.ir import Program
from fxcompress.pipeline import Context
from fxcompress.rewrite import GraphRewriter
from fxcompress.spec import Spec, load_data, load_metric, load_program, parse_steps

__all__ = ["Candidate", "Row", "candidates", "main", "note", "read", "render", "step"]

SPEC = Path(__file__).parents[2] / "specs" / "smollm2" / "spec.yaml"
FILE = RESULTS / "prune_smollm2.json"
EVALUATE, CALIBRATION, TRAIN, WINDOW = 12, 8, 96, 256
KINDS: Final = ("neuron", "head", "kv_group")
HEAL: Final[dict[str, Any]] = {
    "use": "train.fit",
    "steps": 30,
    "losses": [{"use": "next_token"}],
    "optimizer": {"use": "AdamW", "lr": 1e-4, "weight_decay": 0.0},
    "scheduler": {"use": "CosineAnnealingLR", "T_max": "all"},
    "clip_norm": 1.0,
}
_WITHOUT_DATA = ("l1", "l2", "lamp", "fpgm")
_WITH_DATA = ("activation_norm", "wanda", "taylor", "fisher", "obd")
_BEST = ("activation_norm", "wanda", "obd")
_SEEDS = 2


@dataclass(frozen=True)
class Candidate:
    """One way to prune.

    Attributes:
        name: What the table calls it.
        options: Options of `prune.channels` beside the budget and the kinds.
        seed: Of the run; only `random` depends on it.
    """

    name: str
    options: Mapping[str, Any]
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """What came of a candidate; perplexities on the evaluation windows."""

    name: str
    perplexity: float
    parameters: int
    macs: int
    kept: Mapping[str, str]
    seconds: float
    healed: float | None = None
    heal_seconds: float | None = None


def candidates() -> list[Candidate]:
    """Return all of them: by criterion, then with what makes up for the removed."""
    found = [
        Candidate(f"random, seed {seed}", {"criterion": {"name": "random"}}, seed)
        for seed in range(_SEEDS)
    ]
    found += [Candidate(name, {"criterion": {"name": name}}) for name in _WITHOUT_DATA]
    found += [
        Candidate(name, {"criterion": {"name": name, "samples": CALIBRATION}})
        for name in _WITH_DATA
    ]
    best = [each for each in found if each.name in _BEST]
    found += [_changed(each, "least squares", _least_squares(ridge=0.01)) for each in best]
    found.append(_changed(best[-1], "least squares, ridge 1", _least_squares(ridge=1.0)))
    found.append(_changed(best[-1], "least squares, ridge auto", _least_squares()))
    found += [_changed(each, "neurons only", {"kinds": ["neuron"]}) for each in best]
    return found


def _least_squares(**options: float) -> dict[str, Any]:
    return {"compensation": {"method": "least_squares", "samples": CALIBRATION, **options}}


def _changed(candidate: Candidate, how: str, options: Mapping[str, Any]) -> Candidate:
    return Candidate(f"{candidate.name}, {how}", {**candidate.options, **options})


def step(candidate: Candidate) -> dict[str, Any]:
    """Return the pass of a candidate, as in a spec."""
    return {
        "use": "prune.channels",
        "kinds": list(KINDS),
        "budget": {"parameters": "80%"},
        "max_ratio": 0.7,
        **candidate.options,
    }


class Bench:
    """The captured model and its data."""

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

    def perplexity(self, program: Program) -> float:
        """Return the metric of a Program on the split `eval`."""
        value = self.metric.evaluate(program.module, {"eval": self.data["eval"]}, None)
        assert value is not None
        return value

    def prune(self, candidate: Candidate) -> tuple[Row, Program]:
        """Return the figures of a candidate, and the pruned Program."""
        start = time.process_time()
        program, decision = self._apply(self.program, step(candidate), candidate.seed)
        seconds = time.process_time() - start
        row = Row(
            candidate.name,
            self.perplexity(program),
            decision.after.parameters,
            decision.after.macs,
            _kept(decision),
            round(seconds, 1),
        )
        return row, program

    def heal(self, program: Program) -> tuple[float, float]:
        """Return the perplexity after a short training, and its CPU seconds."""
        start = time.process_time()
        healed, _ = self._apply(program, HEAL, 0)
        seconds = time.process_time() - start
        return self.perplexity(healed), round(seconds, 1)

    def _apply(self, program: Program, entry: Mapping[str, Any], seed: int) -> tuple[Program, Any]:
        """Return what a pass makes of a Program, and its decision, without hashes and proofs."""
        (parsed,) = parse_steps([entry])
        torch.manual_seed(seed)
        context = Context(data=self.data, seed=seed, original=self.program)
        decision = parsed.pass_.decide(program, parsed.options, context)
        rewriter = GraphRewriter(program)
        with torch.no_grad():
            parsed.pass_.rewrite(rewriter, decision)
        return rewriter.finish(), decision


def _kept(decision: Any) -> dict[str, str]:
    """Return `kept of size` by kind, summed over the axes of the kind."""
    sizes: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    for axis in decision.axes:
        sizes[axis.kind] += axis.size
        kept[axis.kind] += axis.kept
    return {kind: f"{kept[kind]:,} of {sizes[kind]:,}" for kind in sorted(sizes)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the candidates that are missing and write the table."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    rows = {row.name: row for row in read()}
    if not options.render:
        _run(rows, options.only or ["*"], options.heal)
    (RESULTS / "prune_smollm2.md").write_text(render(list(rows.values())), encoding="utf-8")
    return 0


def _run(rows: dict[str, Row], only: Sequence[str], heal: Sequence[str]) -> None:
    bench = Bench()
    if "original" not in rows:
        analysis = analyze(bench.program)
        parameters, macs = (
            cost.at(analysis.sizes) for cost in (analysis.parameters, analysis.macs)
        )
        note(rows, Row("original", bench.perplexity(bench.program), parameters, macs, {}, 0.0))
    for each in candidates():
        rows.update({row.name: row for row in read()})
        if not any(fnmatch.fnmatch(each.name, pattern) for pattern in only):
            continue
        train = each.name in heal and (each.name not in rows or rows[each.name].healed is None)
        if each.name in rows and not train:
            continue
        row, program = bench.prune(each)
        if train:
            healed, seconds = bench.heal(program)
            row = replace(row, healed=healed, heal_seconds=seconds)
        note(rows, row)


def note(rows: dict[str, Row], row: Row) -> None:
    """Add a row to the table and write it.

    Args:
        rows: The rows known here; those that others wrote are taken in.
        row: The new one.
    """
    # Several processes may fill in one table.
    rows.update({each.name: each for each in read()})
    rows[row.name] = row
    document = {"format_version": "1.0", "rows": [asdict(each) for each in rows.values()]}
    FILE.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    healed = "" if row.healed is None else f", healed {row.healed:.2f}"
    print(f"{row.name}: {row.perplexity:.2f}{healed} {dict(row.kept)} {row.seconds} s", flush=True)


def read() -> list[Row]:
    """Return the rows that are written."""
    if not FILE.exists():
        return []
    return [Row(**entry) for entry in json.loads(FILE.read_text(encoding="utf-8"))["rows"]]


def render(rows: Iterable[Row]) -> str:
    """Return the page: the original, then the others from the best."""
    ordered = sorted(rows, key=lambda row: (row.name != "original", row.perplexity))
    lines = [
        "# SmolLM2-135M with 20 % fewer parameters, by criterion",
        "",
        f"`python -m benchmarks.prune.smollm2` on {machine()}.",
        "",
        f"Perplexity on {EVALUATE * (WINDOW - 1):,} predictions of newspaper editorials"
        f" ({EVALUATE} windows of {WINDOW} tokens). Every candidate prunes {' and '.join(KINDS)}"
        " axes to `budget: {parameters: 80%}` with `max_ratio: 0.7`, and nothing else: the default"
        f" normalisation and reduction of each criterion. Calibration: {CALIBRATION} other windows."
        f" Healed: {HEAL['steps']} steps of AdamW on one window each, next-token loss, learning"
        f" rate {HEAL['optimizer']['lr']:g} falling as a cosine. Seconds are CPU seconds of the"
        " pruning, one thread.",
        "",
        "Heads are, in each of the 30 layers, 3 groups with one key head each, and 3 query heads in"
        " each group. Least squares refits on the calibration windows: with a ridge of 0.01, where"
        " none is named, and so few tokens it fits them too well. `auto`, the default, chooses the"
        " ridge of each layer on windows held out.",
        "",
        "| criterion | perplexity | healed | parameters | MACs | neurons kept | heads kept | s |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in ordered:
        healed = "–" if row.healed is None else f"{row.healed:.2f}"
        lines.append(
            f"| {row.name} | {row.perplexity:,.2f} | {healed} | {row.parameters / 1e6:.1f} M |"
            f" {row.macs / 1e9:.2f} G | {row.kept.get('neuron', '–')} |"
            f" {_heads(row)} | {row.seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _heads(row: Row) -> str:
    """Return the heads kept, groups of keys included; the two were one kind at first."""
    return " + ".join(row.kept[kind] for kind in ("kv_group", "head") if kind in row.kept) or "–"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prune.smollm2", description=__doc__)
    parser.add_argument(
        "--only", action="append", default=[], metavar="GLOB", help="names of candidates"
    )
    parser.add_argument(
        "--heal", action="append", default=[], metavar="NAME", help="also train this candidate"
    )
    parser.add_argument("--render", action="store_true", help="only write the table again")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
