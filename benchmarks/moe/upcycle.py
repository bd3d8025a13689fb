"""A language model of characters that goes on dense, and as experts at equal active compute.

python -m benchmarks.moe.upcycle TEXT [--cache FOLDER] [--only GLOB] [--steps N] [--render]

The model and the text are those of `benchmarks.quantize.characters`, whose docstring says where the
text comes from; with `--cache` the model is trained once. Each row is written to
results/moe_upcycle.json when it is done, and what is there is not run again.
"""

from __future__ import annotations

import argparse
import fnmatch
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from torch import Tensor

import fxcompress as fxc
from benchmarks._common import RESULTS, machine, read_rows, write_rows
from benchmarks.quantize._characters import Text, bits_per_character, read_text, trained
from fxcompress.ir import Program
from fxcompress.pipeline import Context
from fxcompress.rewrite import GraphRewriter
from fxcompress.spec import parse_steps
from fxcompress.train import fit, training_copy
from fxcompress.train.config import FitConfig
from fxcompress.train.joint import Joining
from passes.moe._routing import find_mixtures
from passes.moe._use import measure

__all__ = ["Row", "main", "render"]

FILE: Final = RESULTS / "moe_upcycle.json"
JUDGED, SEEDS, BATCH, WINDOW = 256, 2, 8, 128
BALANCE: Final = 0.05
VARIANTS: Final[Mapping[str, Mapping[str, Any] | None]] = {
    "dense": None,
    "8 experts, 1 a token, straight-through": {
        "experts": 8, "top_k": 1, "weights": "straight_through",
    },
    "16 experts of half width, 2 a token": {"experts": 16, "top_k": 2, "slices": 2},
    "8 experts, 1 a token, probabilities": {"experts": 8, "top_k": 1, "weights": "softmax"},
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A model that went on training.

    Attributes:
        variant: What it was made before.
        seed: Of routers, data and order.
        steps: Of 8 windows of 128 characters.
        before: Bits per character of held-out text at the start.
        after: At the end.
        parameters: In all.
        active: That a token meets.
        busiest: The largest share of a layer's choices that one expert has at the end; None if
            dense.
        seconds: CPU seconds of the training, one thread.
    """

    variant: str
    seed: int
    steps: int
    before: float
    after: float
    parameters: int
    active: int
    busiest: float | None
    seconds: float

    @property
    def name(self) -> str:
        """What `--only` calls it."""
        return f"{self.variant} seed {self.seed}"


def upcycled(program: Program, options: Mapping[str, Any] | None, seed: int) -> tuple[Program, int]:
    """Return the model with experts, and how many of its parameters a token meets."""
    total = sum(p.numel() for p in program.module.parameters())
    if options is None:
        return program, total
    (parsed,) = parse_steps([{"use": "moe.upcycle", **options}])
    decision = parsed.pass_.decide(program, parsed.options, Context(seed=seed))
    rewriter = GraphRewriter(program)
    parsed.pass_.rewrite(rewriter, decision)
    layers = decision.layers
    return rewriter.finish(), total + sum(each.active - each.parameters[0] for each in layers)


def batches(text: Text, steps: int, seed: int) -> list[tuple[Mapping[str, Tensor], Tensor]]:
    """Return windows of the training pieces, other ones in each step."""
    generator = torch.Generator().manual_seed(seed)
    pieces = torch.stack(text.training)
    found: list[tuple[Mapping[str, Tensor], Tensor]] = []
    for _ in range(steps):
        which = torch.randint(len(pieces), (BATCH,), generator=generator)
        start = torch.randint(pieces.shape[1] - WINDOW, (BATCH, 1), generator=generator)
        ids = pieces[which].gather(1, start + torch.arange(WINDOW))
        found.append(({"input_ids": ids}, ids))
    return found


def run(variant: str, seed: int, steps: int, program: Program, text: Text) -> Row:
    """Train a variant and judge it."""
    options = VARIANTS[variant]
    judged = text.windows(held_out=True, count=JUDGED)
    made, active = upcycled(program, options, seed)
    losses: list[dict[str, Any]] = [{"use": "next_token"}]
    if options is not None:
        balance = {"use": "load_balance", "weight": BALANCE, "top_k": options["top_k"]}
        losses += [balance, {"use": "router_z", "weight": 0.001}]
    config = FitConfig.model_validate(
        {
            "epochs": 1,
            "losses": losses,
            "precision": "bf16",
            "clip_norm": 1.0,
            "optimizer": {
                "use": "AdamW",
                "lr": 1e-3,
                "weight_decay": 0.1,
                "betas": [0.9, 0.95],
                "fused": True,
            },
            "scheduler": {"use": "CosineAnnealingLR", "T_max": "all", "warmup": 50},
        }
    )
    module = training_copy(made)
    joining = None if options is None else Joining(replace(made, module=module))
    before = bits_per_character(module.eval(), judged)
    start = time.process_time()
    fit(module, config, batches(text, steps, seed), seed=seed, joining=joining)
    seconds = time.process_time() - start
    after = bits_per_character(module.eval(), judged)
    return Row(
        variant=variant,
        seed=seed,
        steps=steps,
        before=before,
        after=after,
        parameters=sum(p.numel() for p in module.parameters()),
        active=active,
        busiest=_busiest(replace(made, module=module), judged),
        seconds=round(seconds, 1),
    )


def _busiest(program: Program, judged: Tensor) -> float | None:
    mixtures = find_mixtures(program)
    if not mixtures:
        return None
    use = measure(program, mixtures, [{"input_ids": judged[:64, :-1]}])
    return max(float(each.shares.max()) for each in use.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rows that are missing and write the table."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.text is None and not options.render:
        parser.error("name the file of the text")
    torch.set_num_threads(1)
    rows = {row.name: row for row in read_rows(FILE, Row)}
    if not options.render:
        with TemporaryDirectory() as folder:
            _run(options, rows, options.cache or Path(folder))
    (RESULTS / "moe_upcycle.md").write_text(render(rows.values()), encoding="utf-8")
    return 0


def _run(options: argparse.Namespace, rows: dict[str, Row], cache: Path) -> None:
    text = read_text(options.text)
    model, _ = trained(text, cache)
    example = torch.zeros(2, WINDOW, dtype=torch.int64)
    program = fxc.capture(model, kwargs={"input_ids": example}, dynamic="batch")
    for seed in range(SEEDS):
        for variant in VARIANTS:
            name = f"{variant} seed {seed}"
            if name in rows or not any(fnmatch.fnmatch(name, p) for p in options.only or ["*"]):
                continue
            row = run(variant, seed, options.steps, program, text)
            rows[name] = row
            write_rows(FILE, rows.values())
            print(f"{name}: {row.before:.4f} → {row.after:.4f}, {row.seconds} s", flush=True)


def render(rows: Iterable[Row]) -> str:
    """Return the page: means over seeds, then each seed's end."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.variant, []).append(row)
    steps = sorted({row.steps for group in found.values() for row in group})
    lines = [
        "# Upcycling a language model of characters",
        "",
        f"`python -m benchmarks.moe.upcycle TEXT` on {machine()}.",
        "",
        "A causal transformer of 2.4 million parameters (3 layers of width 256), trained for 1,500"
        f" steps on the King James Bible, goes on for {' or '.join(f'{n:,}' for n in steps)} steps"
        f" of {BATCH} windows of {WINDOW} characters: as it is, or with all its feed-forward layers"
        " upcycled. All meet as many weights a token as the dense model, but for routers. The same"
        " data in the same order for a seed, one recipe for all (AdamW, 1e-3 along a cosine,"
        f" bfloat16 products), `load_balance` of {BALANCE:g} and `router_z` of 0.001 for experts;"
        " nothing was tuned for any of them. Bits per character on"
        f" {JUDGED} windows of pieces that were held out. Busiest: the largest share of a layer's"
        " choices that one expert has at the end. Seconds are CPU seconds of one thread.",
        "",
        "| model | parameters | active | at the start | at the end | by seed | busiest | s |",
        "|:--|--:|--:|--:|--:|:--|--:|--:|",
    ]
    missing = [
        f"{variant} seed {seed}"
        for seed in range(SEEDS)
        for variant in VARIANTS
        if seed not in [row.seed for row in found.get(variant, [])]
    ]
    for variant, group in sorted(found.items(), key=lambda each: list(VARIANTS).index(each[0])):
        first = group[0]
        each = ", ".join(f"{row.after:.4f}" for row in sorted(group, key=lambda row: row.seed))
        busiest = [row.busiest for row in group if row.busiest is not None]
        lines.append(
            f"| {variant} | {first.parameters / 1e6:.2f} M | {first.active / 1e6:.2f} M |"
            f" {mean(row.before for row in group):.4f} | {mean(row.after for row in group):.4f} |"
            f" {each} | {f'{max(busiest):.0%}' if busiest else '–'} |"
            f" {mean(row.seconds for row in group):.0f} |"
        )
    if missing:
        lines += ["", f"Not run yet: {'; '.join(missing)}. A comparison needs all of a seed."]
    return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moe.upcycle", description=__doc__)
    parser.add_argument(
        "text", nargs="?", type=Path, help="verses, one a line, after their references"
    )
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="keeps the trained model")
    parser.add_argument("--only", action="append", default=[], metavar="GLOB", help="names of rows")
    parser.add_argument("--steps", type=int, default=500, help="of training")
    parser.add_argument("--render", action="store_true", help="only write the table again")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
