"""Bits per character of a small mixture of experts without a quarter, and half, of its experts.

python -m benchmarks.moe.prune TEXT [--cache FOLDER] [--seed N] [--render]

Mixtral of 0.64 million parameters is trained on the King James Bible first, a CPU-minute for each
seed; with `--cache` only once. Where TEXT comes from is told in `benchmarks.quantize.characters`.

Each row is written to results/moe_prune.json when it is done, and what is there is not run again.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch

import fxcompress as fxc
from benchmarks._common import RESULTS, machine, read_rows, write_rows
from benchmarks.moe._command import parsed, spread
from benchmarks.moe._model import STEPS, batches, next_character, trained
from benchmarks.quantize._characters import calibration, read_text
from fxcompress.ir import Program
from fxcompress.pipeline import Context
from fxcompress.rewrite import GraphRewriter
from fxcompress.spec import parse_steps

__all__ = ["Row", "main", "render"]

FILE: Final = RESULTS / "moe_prune.json"
SEEDS: Final = (0, 1, 2)
RATIOS: Final = (0.25, 0.5)
JUDGED, CALIBRATION, HEAL, RATE = 256, 128, 100, 1e-3
CRITERIA: Final = ("reap", "frequency", "mass", "random")
METHODS: Final = (*CRITERIA, "merge")


@dataclass(frozen=True)
class Row:
    """A method at a seed: bits per character, before and after healing, and parameters left."""

    seed: int
    ratio: float
    method: str
    bits: float
    healed: float | None
    parameters: int
    seconds: float

    @property
    def name(self) -> str:
        """What tells it from the others."""
        return f"{self.seed} {self.ratio} {self.method}"


class Bench:
    """A trained model with its mixtures lifted, and what it is judged on."""

    def __init__(self, path: Path, cache: Path, seed: int) -> None:
        self.seed, self.text = seed, read_text(path)
        model = trained(self.text, seed, cache)
        self.judged = self.text.windows(held_out=True, count=JUDGED)
        self.data = {"calibration": calibration(self.text, CALIBRATION)}
        example = dict(self.data["calibration"][0])
        captured = fxc.capture(model, kwargs=example, dynamic="batch", verify=False)
        self.program = self.apply(captured, {"use": "moe.lift"})

    def apply(self, program: Program, entry: Mapping[str, Any]) -> Program:
        """Return what a pass makes of a Program, without hashes and proofs."""
        (parsed,) = parse_steps([dict(entry)])
        context = Context(data=self.data, seed=self.seed)
        decision = parsed.pass_.decide(program, parsed.options, context)
        rewriter = GraphRewriter(program)
        with torch.no_grad():
            parsed.pass_.rewrite(rewriter, decision)
        return rewriter.finish()

    def original(self) -> Row:
        """Return the figures of the whole model, healed too, for what more training gives."""
        return self._row(self.program, 0.0, "whole", 0.0)

    def run(self, ratio: float, method: str) -> Row:
        """Return the figures of a method."""
        entry: dict[str, Any] = {"use": "moe.prune_experts", "ratio": ratio, "criterion": method}
        if method == "merge":
            entry = {"use": "moe.merge_experts", "ratio": ratio}
        if method != "random":
            entry["calibration"] = CALIBRATION
        start = time.process_time()
        made = self.apply(self.program, entry)
        return self._row(made, ratio, method, time.process_time() - start)

    def _row(self, program: Program, ratio: float, method: str, seconds: float) -> Row:
        before = self.judge(program)
        healed = self.judge(self.heal(program))
        parameters = sum(t.numel() for t in program.state().values() if t.is_floating_point())
        return Row(self.seed, ratio, method, before, healed, parameters, round(seconds, 1))

    def heal(self, program: Program) -> Program:
        """Return the Program trained a little more, all of it."""
        copied = program.copy()
        module = copy.deepcopy(copied.module).train()
        optimizer = torch.optim.AdamW(module.parameters(), lr=RATE, betas=(0.9, 0.95), fused=True)
        for step, batch in enumerate(batches(self.text, HEAL, 100 + self.seed)):
            for group in optimizer.param_groups:
                group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / HEAL))
            loss = next_character(_logits(module, batch[:, :-1]), batch[:, 1:])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        copied.module.load_state_dict(module.state_dict(), assign=True)
        return copied

    @torch.no_grad()
    def judge(self, program: Program) -> float:
        """Return bits per character of the held-out windows."""
        module = program.module.eval()
        losses = [
            next_character(_logits(module, each[:, :-1]), each[:, 1:]) * len(each)
            for each in self.judged.split(8)
        ]
        return float(torch.stack(losses).sum()) / len(self.judged) / math.log(2)


def _logits(module: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    made: Any = module(input_ids=ids)
    logits: torch.Tensor = made["logits"] if isinstance(made, Mapping) else made[0]
    return logits


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the methods that are missing and write the table."""
    options = parsed("benchmarks.moe.prune", __doc__, arguments)
    torch.set_num_threads(1)
    rows = {row.name: row for row in read_rows(FILE, Row)}
    if not options.render:
        with TemporaryDirectory() as folder:
            for seed in options.seed or SEEDS:
                _run(Bench(options.text, options.cache or Path(folder), seed), rows)
    (RESULTS / "moe_prune.md").write_text(render(rows.values()), encoding="utf-8")
    return 0


def _run(bench: Bench, rows: dict[str, Row]) -> None:
    if f"{bench.seed} 0.0 whole" not in rows:
        _note(rows, bench.original())
    for ratio in RATIOS:
        for method in METHODS:
            if f"{bench.seed} {ratio} {method}" not in rows:
                _note(rows, bench.run(ratio, method))


def _note(rows: dict[str, Row], row: Row) -> None:
    rows[row.name] = row
    write_rows(FILE, rows.values())
    print(f"{row.name}: {row.bits:.4f}, healed {row.healed}, {row.seconds} s", flush=True)


def render(rows: Iterable[Row]) -> str:
    """Return the page: by share of experts, from the best before healing."""
    groups: dict[tuple[float, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.ratio, row.method].append(row)
    seeds = max((len(each) for each in groups.values()), default=0)
    lines = [
        "# A small mixture of experts with fewer experts",
        "",
        f"`python -m benchmarks.moe.prune TEXT` on {machine()}.",
        "",
        f"Mixtral with 3 layers of width 64, 8 experts of hidden width 128 in each, 2 for a"
        f" token, trained on the King James Bible for {STEPS} steps of 1,024 characters with the"
        f" library's balance loss; {seeds} seeds, all figures mean ± standard deviation over them."
        f" Bits per character on {JUDGED} windows of 128 characters from pieces that were held out."
        f" Calibrated on {CALIBRATION} windows of the training pieces. Healed: {HEAL} more steps of"
        " all weights without the balance loss; the whole model too, for what more training gives."
        " `merge` is `moe.merge_experts`, all others `moe.prune_experts`. The model is small and"
        " trained shortly: its experts are not those of a large one.",
        "",
        "| experts | method | parameters | bits per character | against whole | healed |",
        "|:--|:--|--:|--:|--:|--:|",
    ]
    whole = {row.seed: row.bits for row in groups.get((0.0, "whole"), [])}
    order = sorted(groups, key=lambda key: (key[0], statistics.mean(r.bits for r in groups[key])))
    for ratio, method in order:
        found = groups[ratio, method]
        more = [row.bits - whole[row.seed] for row in found if row.seed in whole]
        healed = [row.healed for row in found if row.healed is not None]
        lines.append(
            f"| {8 - round(8 * ratio)} of 8 | {method} | {found[0].parameters:,} |"
            f" {spread([row.bits for row in found])} | {spread(more, '+')} | {spread(healed)} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
