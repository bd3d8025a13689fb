"""Bits per character of a small mixture of experts whose experts are stored as integers.

python -m benchmarks.moe.quantize TEXT [--cache FOLDER] [--seed N] [--render]

The models are those of `benchmarks.moe.prune`: with its `--cache` they are not trained again. Where
TEXT comes from is told in `benchmarks.quantize.characters`.

Each row is written to results/moe_quantize.json when it is done, and what is there is not run
again.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch

from benchmarks._common import RESULTS, machine, read_rows, write_rows
from benchmarks.moe._command import parsed, spread
from benchmarks.moe._model import STEPS
from benchmarks.moe.prune import CALIBRATION, JUDGED, SEEDS, Bench
from fxcompress.analysis import cost
from fxcompress.ir import Program

__all__ = ["WHOLE", "Row", "formats", "main", "render"]

FILE: Final = RESULTS / "moe_quantize.json"
EXPERTS: Final = 8
GROUP: Final = 32
METHODS: Final = ("rtn", "gptq")
_ALL: Final = ("*.experts",)
WHOLE: Final = "float"


@dataclass(frozen=True)
class Row:
    """A format at a seed: bits per character, and bytes that the experts' matrices take."""

    seed: int
    format: str
    method: str
    bits: float
    bytes: int

    @property
    def name(self) -> str:
        """What tells it from the others."""
        return f"{self.seed} {self.format} {self.method}"


def formats(seed: int) -> dict[str, dict[str, Any]]:
    """Return options of `quantize.weight_only` by name; chance draws by the seed."""
    few = {"bits": 4, "group": GROUP}
    drawn = random.Random(seed).sample(range(EXPERTS), EXPERTS // 2)
    some = [f"*.experts.{expert}" for expert in sorted(drawn)]

    def with_override(targets: Sequence[str], bits: int, **more: float) -> dict[str, Any]:
        return {**few, "overrides": [{"targets": list(targets), "bits": bits, **more}]}

    return {
        "8 bits": {"bits": 8, "group": None},
        "4 bits": few,
        "3 bits": {**few, "bits": 3},
        "2 bits": {**few, "bits": 2},
        "4 bits, the rarest half 3": with_override(_ALL, 3, rarest=0.5),
        "4 bits, half by chance 3": with_override(some, 3),
        "4 bits, the rarest quarter 2": with_override(_ALL, 2, rarest=0.25),
        "4 bits, the rarest half 2": with_override(_ALL, 2, rarest=0.5),
        "4 bits, half by chance 2": with_override(some, 2),
    }


class _Bench(Bench):
    """Bits per character of the trained model with quantised experts."""

    def whole(self) -> Row:
        """Return the figures in float."""
        return Row(self.seed, WHOLE, "", self.judge(self.program), _bytes(self.program))

    def measure(self, name: str, method: str) -> Row:
        """Return the figures of a format."""
        chosen = {"targets": ["*.experts"], "method": method, "calibration": CALIBRATION}
        entry = {"use": "quantize.weight_only", **chosen, **formats(self.seed)[name]}
        made = self.apply(self.program, entry)
        return Row(self.seed, name, method, self.judge(made), _bytes(made))


def _bytes(program: Program) -> int:
    """Return the bytes of experts' matrices as files store them, scales and zero points too."""
    return sum(each.bytes for each in cost(program).per_node if ".experts" in each.id)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the formats that are missing and write the table."""
    options = parsed("benchmarks.moe.quantize", __doc__, arguments)
    torch.set_num_threads(1)
    rows = {row.name: row for row in read_rows(FILE, Row)}
    if not options.render:
        with TemporaryDirectory() as folder:
            for seed in options.seed or SEEDS:
                _run(_Bench(options.text, options.cache or Path(folder), seed), rows)
    (RESULTS / "moe_quantize.md").write_text(render(rows.values()), encoding="utf-8")
    return 0


def _run(bench: _Bench, rows: dict[str, Row]) -> None:
    if f"{bench.seed} {WHOLE} " not in rows:
        _note(rows, bench.whole())
    for name in formats(bench.seed):
        for method in METHODS:
            if f"{bench.seed} {name} {method}" not in rows:
                _note(rows, bench.measure(name, method))


def _note(rows: dict[str, Row], row: Row) -> None:
    rows[row.name] = row
    write_rows(FILE, rows.values())
    print(f"{row.name}: {row.bits:.4f}, {row.bytes} bytes", flush=True)


def render(rows: Iterable[Row]) -> str:
    """Return the page: a line for each format, from the largest."""
    groups: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row.format][row.method].append(row)
    whole = {row.seed: row for row in groups.pop(WHOLE, {}).get("", [])}
    seeds = max(len(whole), 1)
    lines = [
        "# A small mixture of experts with its experts as integers",
        "",
        f"`python -m benchmarks.moe.quantize TEXT` on {machine()}.",
        "",
        "Mixtral with 3 layers of width 64, 8 experts of hidden width 128 in each, 2 for a token,"
        f" trained on the King James Bible for {STEPS} steps of 1,024 characters; {seeds} seeds,"
        " figures are mean ± standard deviation over them. Bits per character more than in float,"
        f" on {JUDGED} windows of 128 characters from pieces that were held out. Only the experts"
        f" are quantised: 8 bits per channel, all else in groups of {GROUP}, affine. `gptq` sees"
        f" {CALIBRATION} windows of the training pieces, each expert its own tokens; `rtn` sees"
        " none. Which experts are rare is counted on the same windows, mixture by mixture; those"
        " by chance are the same numbers in every mixture, drawn for each seed. Bytes are those"
        " of the experts' matrices in a file, scales and zero points included. The model is small"
        " and trained with a balance loss: its experts are used more evenly than those of others.",
        "",
        "| experts | bytes | of float | rtn | gptq |",
        "|:--|--:|--:|--:|--:|",
    ]
    if whole:
        size = next(iter(whole.values())).bytes
        bits = spread([row.bits for row in whole.values()], digits=4)
        lines.append(f"| float | {size:,} | 100 % | {bits} bits per character | |")
    for name, methods in groups.items():
        found = next(iter(methods.values()))[0]
        share = f"{found.bytes / whole[found.seed].bytes:.0%}".replace("%", " %")
        more = [
            spread([r.bits - whole[r.seed].bits for r in methods.get(method, [])], "+", digits=4)
            for method in METHODS
        ]
        lines.append(f"| {name} | {found.bytes:,} | {share} | {more[0]} | {more[1]} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
