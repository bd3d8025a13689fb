"""Time of analysis, choice and rewriting against Torch-Pruning's graph building and pruning.

python -m benchmarks.prune.speed [--repeats 5] [--limit 60]

Both in one process, in turns; capture is timed apart. Then ours alone on models that grow, for the
seconds per node.
"""

from __future__ import annotations

import argparse
import copy
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING

import torch

from benchmarks._common import RESULTS, machine, median

from ._ours import decide, rewrite
from ._peer import prune_with_peer, recipe
from ._plot import plot
from ._speed_models import GROWING, MODELS, Case

if TYPE_CHECKING:
    from fxcompress.ir import Program

__all__ = ["main"]

RATIO = 0.5


class _Late(Exception):
    """The peer used more CPU time than it is given."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write the tables and the plot."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = [_row(name, build(), options) for name, build in MODELS.items()]
    grown = {
        family: [_growth(name, build(), options.repeats) for name, build in cases.items()]
        for family, cases in GROWING.items()
    }
    _write(rows, grown)
    return 0


def _row(name: str, case: Case, options: argparse.Namespace) -> tuple[str, ...]:
    program, captured = _capture(case)
    ours: list[float] = []
    theirs: list[float] = []
    reason = ""
    _ours(program)  # first calls fill caches
    for turn in range(options.repeats):
        if not reason:
            result = _peer(case, options.limit)
            if isinstance(result, str):
                reason = result
            elif turn or options.repeats == 1:
                theirs.append(result)
        ours.append(_ours(program))
    mine = median(ours)
    print(f"{name}: ours {mine:.2f} s, theirs {theirs or reason}", flush=True)
    if reason:
        return name, f"{captured:.2f}", f"{mine:.2f}", reason, "–"
    other = median(theirs)
    return name, f"{captured:.2f}", f"{mine:.2f}", f"{other:.2f}", f"{mine / other:.2f}"


def _capture(case: Case) -> tuple[Program, float]:
    from fxcompress.ir import capture

    args, kwargs = case.inputs
    start = time.process_time()
    program = capture(case.model, args, kwargs, dynamic=case.dynamic, verify=False)
    return program, time.process_time() - start


def _ours(program: Program) -> float:
    start = time.process_time()
    rewrite(program, decide(program, RATIO))
    return time.process_time() - start


def _peer(case: Case, limit: float) -> float | str:
    """Return CPU seconds on a copy of the model, or why there are none."""
    model = copy.deepcopy(case.model)
    try:
        how = recipe(model, case.inputs, text=case.text)
        return _within(limit, lambda: prune_with_peer(model, case.inputs, how, RATIO).seconds)
    except _Late:
        return f"no end within {limit:.0f} s"
    except Exception as error:  # what it raises is its result
        return f"{type(error).__name__}"


def _within(limit: float, call: Callable[[], float]) -> float:
    def late(_: int, __: FrameType | None) -> None:
        raise _Late

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit)
    try:
        return call()
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _growth(name: str, case: Case, repeats: int) -> tuple[str, int, float]:
    program, _ = _capture(case)
    _ours(program)
    seconds = median([_ours(program) for _ in range(min(repeats, 3))])
    nodes = len(program.graph.nodes)
    print(f"{name}: {nodes} nodes, {seconds:.2f} s", flush=True)
    return name, nodes, seconds


def _write(rows: Sequence[tuple[str, ...]], grown: dict[str, list[tuple[str, int, float]]]) -> None:
    lines = [
        "# Structured pruning: speed",
        "",
        f"`python -m benchmarks.prune.speed` on {machine()}.",
        "",
        "CPU seconds, medians, in turns in one process on one thread, images of 64 pixels. Ours is"
        " `prune.channels` at ratio 0.5: analysis, L2 scores, choice and rewriting. Torch-Pruning's"
        " is building its graph and pruning by the same ratio and criterion. Goal: ratio ≤ 1.",
        "",
        "| model | capture, s | ours, s | Torch-Pruning, s | ratio |",
        "|:--|--:|--:|--:|--:|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        "How ours grows:",
        "",
        "| model | nodes | s | ms per node |",
        "|:--|--:|--:|--:|",
    ]
    for points in grown.values():
        lines += [f"| {n} | {c:,} | {s:.2f} | {1000 * s / c:.2f} |" for n, c, s in points]
    lines += ["", "![seconds over nodes](prune_speed.svg)"]
    (RESULTS / "prune_speed.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (RESULTS / "prune_speed.svg").write_text(plot(grown), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prune.speed", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=float, default=60.0, help="CPU s that the peer may take")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
