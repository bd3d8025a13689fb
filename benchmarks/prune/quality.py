"""Accuracy after pruning to equal MACs and equal fine-tuning: Torch-Pruning's criteria and ours.

python -m benchmarks.prune.quality [--only GLOB] [--seeds 3] [--render]

A cell is dataset, network, seed, MACs and candidate. Each is written to
results/prune_quality.json when it is done, and what is there is not run again.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from benchmarks._common import RESULTS, machine

from ._quality_models import NETWORKS, network
from ._quality_prune import CANDIDATES, Pruner
from ._quality_train import DATASETS, accuracy, fit, load, macs

__all__ = ["main"]

SHARES = {"2×": 0.5, "4×": 0.25}
RATE, TUNE_RATE = 3e-3, 1e-3
_FILE = RESULTS / "prune_quality.json"
_TUNE_SEED = 100


@dataclass(frozen=True)
class Cell:
    """One candidate at one cost on one trained network; accuracies are shares of the test set."""

    dataset: str
    network: str
    seed: int
    cost: str
    candidate: str
    dense: float = 0.0
    pruned: float = 0.0
    tuned: float = 0.0
    macs: int = 0
    macs_before: int = 0
    seconds: float = 0.0

    @property
    def id(self) -> str:
        """What `--only` selects by."""
        return f"{self.dataset}/{self.network}/{self.seed}/{self.cost}/{self.candidate}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cells that are missing and write the table."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    cells = {cell.id: cell for cell in _read()}
    if not options.render:
        for seed, dataset, name in itertools.product(range(options.seeds), DATASETS, NETWORKS):
            wanted = [c for c in _cells(dataset, name, seed) if fnmatch.fnmatch(c.id, options.only)]
            missing = [cell for cell in wanted if cell.id not in cells]
            if missing:
                _run(missing, cells)
    page = _render(list(cells.values()))
    (RESULTS / "prune_quality.md").write_text(page, encoding="utf-8")
    return 0


def _cells(dataset: str, name: str, seed: int) -> Iterator[Cell]:
    for cost, candidate in itertools.product(SHARES, CANDIDATES):
        yield Cell(dataset, name, seed, cost, candidate)


def _run(missing: Sequence[Cell], cells: dict[str, Cell]) -> None:
    """Train one network and fill its missing cells in."""
    first = missing[0]
    data = DATASETS[first.dataset]
    train, test = load(first.dataset)
    model = network(first.network, data.size, first.seed)
    fit(model, train, data.epochs, RATE, first.seed)
    dense, pruner = accuracy(model, test), Pruner(model, train, data.size)
    for cell in missing:
        start = time.process_time()
        pruned = pruner.prune(cell.candidate, SHARES[cell.cost])
        if pruned is None:
            continue
        kept = copy.deepcopy(pruned)
        fit(kept, train, data.tune_epochs, TUNE_RATE, first.seed + _TUNE_SEED)
        done = Cell(
            *(cell.dataset, cell.network, cell.seed, cell.cost, cell.candidate),
            dense=dense,
            pruned=accuracy(pruned, test),
            tuned=accuracy(kept, test),
            macs=macs(pruned, data.size),
            macs_before=pruner.cost,
            seconds=time.process_time() - start,
        )
        cells[cell.id] = done
        left = done.macs / done.macs_before
        print(f"{done.id}: {dense:.2%} → {done.pruned:.2%} → {done.tuned:.2%}, {left:.0%} MACs,"
              f" {done.seconds:.1f} s", flush=True)  # fmt: skip
        _write(list(cells.values()))


def _read() -> list[Cell]:
    if not _FILE.exists():
        return []
    return [Cell(**entry) for entry in json.loads(_FILE.read_text(encoding="utf-8"))["cells"]]


def _write(cells: Sequence[Cell]) -> None:
    document = {"format_version": "1.0", "cells": [asdict(cell) for cell in cells]}
    _FILE.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _render(cells: Sequence[Cell]) -> str:
    datasets = "; ".join(
        f"{name}: {data.train} images for training, {data.test} for testing, {data.epochs} epochs"
        f" and {data.tune_epochs} after pruning"
        for name, data in DATASETS.items()
    )
    lines = [
        "# Structured pruning: quality at equal MACs",
        "",
        f"`python -m benchmarks.prune.quality` on {machine()}.",
        "",
        "Mean test accuracy in percent over the seeds (how many in brackets where not all), after"
        " pruning to 1/2 or 1/4 of the MACs and equal fine-tuning. Every candidate starts from the"
        " same trained weights and is tuned by the same loop with the same batches. MACs may be 2 %"
        f" above what is asked. {datasets}. Torch-Pruning's ratio is searched until the MACs fit.",
        "",
    ]
    columns = list(itertools.product(DATASETS, NETWORKS, SHARES))
    lines.append("| candidate | " + " | ".join(f"{d} {n} {c}" for d, n, c in columns) + " |")
    lines.append("|:--|" + "--:|" * len(columns))
    seeds = len({cell.seed for cell in cells})
    rows = {name: [_mean(cells, name, *column) for column in columns] for name in CANDIDATES}
    best = {s: [_best(rows, s, i) for i in range(len(columns))] for s in ("Torch-Pruning", "ours")}
    dense = [_dense(cells, *column[:2]) for column in columns]
    lines.append(_line("dense", [f"{100 * value:.2f}" if value else "–" for value in dense]))
    for name, values in rows.items():
        side = name.partition(":")[0]
        shown = [
            _show(value, value is not None and value[0] == best[side][i], seeds)
            for i, value in enumerate(values)
        ]
        lines.append(_line(name, shown))
    gains = [
        f"{100 * (ours - peer):+.2f}" if ours is not None and peer is not None else "–"
        for ours, peer in zip(best["ours"], best["Torch-Pruning"], strict=True)
    ]
    lines.append(_line("best of ours − best of Torch-Pruning", gains))
    return "\n".join(lines) + "\n"


def _mean(
    cells: Sequence[Cell], candidate: str, dataset: str, name: str, cost: str
) -> tuple[float, int] | None:
    wanted = (dataset, name, cost, candidate)
    values = [c.tuned for c in cells if (c.dataset, c.network, c.cost, c.candidate) == wanted]
    return (statistics.mean(values), len(values)) if values else None


def _dense(cells: Sequence[Cell], dataset: str, name: str) -> float:
    by_seed = {c.seed: c.dense for c in cells if (c.dataset, c.network) == (dataset, name)}
    return statistics.mean(by_seed.values()) if by_seed else 0.0


def _best(rows: dict[str, list[tuple[float, int] | None]], side: str, column: int) -> float | None:
    values = [r[column] for name, r in rows.items() if name.startswith(side)]
    return max((value[0] for value in values if value is not None), default=None)


def _show(value: tuple[float, int] | None, best: bool, seeds: int) -> str:
    if value is None:
        return "–"
    text = f"{100 * value[0]:.2f}" + (f" ({value[1]})" if value[1] < seeds else "")
    return f"**{text}**" if best else text


def _line(name: str, cells: Sequence[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prune.quality", description=__doc__)
    parser.add_argument("--only", default="*", metavar="GLOB", help="cells, such as digits/ViT/0/*")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--render", action="store_true", help="only write the table again")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
