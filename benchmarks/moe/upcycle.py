"""A language model of characters that goes on dense, and as experts at equal active compute.

python -m benchmarks.moe.upcycle TEXT [--cache FOLDER] [--only GLOB] [--render]

The models and the text are those of `benchmarks.quantize.characters`, whose docstring says where
the text comes from; with `--cache` the models are trained once. Each row is written to
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

__all__ = ["BASES", "Row", "main", "render"]

FILE: Final = RESULTS / "moe_upcycle.json"
JUDGED, SEEDS, BATCH, WINDOW = 256, 2, 8, 128


@dataclass(frozen=True)
class Variant:
    """One way to go on: dense, or as experts with options of `moe.upcycle`, and its rate."""

    name: str
    options: Mapping[str, Any] | None
    rate: float


@dataclass(frozen=True)
class Base:
    """A dense model, and how it goes on.

    Attributes:
        width: Of its hidden states.
        before: Steps of its training.
        steps: That it goes on for.
        balance: Weight of `load_balance`.
        precision: Of the products of what goes on.
        variants: What it goes on as.
        tuned: What was tuned, in words.
    """

    width: int
    before: int
    steps: int
    balance: float
    precision: str
    variants: tuple[Variant, ...]
    tuned: str


_SLICED: Final = {"experts": 16, "top_k": 2, "slices": 2}
_STRAIGHT: Final = {"experts": 8, "top_k": 1, "weights": "straight_through"}
_HALVES, _ONE = "16 experts of half width, 2 a token", "8 experts, 1 a token"
BASES: Final[Mapping[str, Base]] = {
    "2.4 M": Base(
        256, 1500, 500, 0.05, "bf16",
        (
            Variant("dense", None, 1e-3),
            Variant(f"{_ONE}, straight-through", _STRAIGHT, 1e-3),
            Variant(_HALVES, _SLICED, 1e-3),
        ),
        "nothing was tuned for any of them",
    ),
    "41 k": Base(
        32, 2000, 1500, 0.02, "float32",
        (
            Variant("dense", None, 16e-3),
            Variant(f"{_ONE}, renormalised", {"experts": 8, "top_k": 1}, 4e-3),
            Variant(_HALVES, _SLICED, 16e-3),
        ),
        "the rate of each is its best of 0.002, 0.004, 0.008 and 0.016 (one expert: not tried) on "
        "another seed",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A model that went on training.

    Attributes:
        base: Which model it was.
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

    base: str
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
        return _name(self.base, self.variant, self.seed)


def _name(base: str, variant: str, seed: int) -> str:
    return f"{base}: {variant}, seed {seed}"


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


def run(name: str, variant: Variant, seed: int, program: Program, text: Text) -> Row:
    """Train a variant of a base and judge it."""
    base, options = BASES[name], variant.options
    judged = text.windows(held_out=True, count=JUDGED)
    made, active = upcycled(program, options, seed)
    losses: list[dict[str, Any]] = [{"use": "next_token"}]
    if options is not None:
        balance = {"use": "load_balance", "weight": base.balance, "top_k": options["top_k"]}
        losses += [balance, {"use": "router_z", "weight": 0.001}]
    config = FitConfig.model_validate(
        {
            "epochs": 1,
            "losses": losses,
            "precision": base.precision,
            "clip_norm": 1.0,
            "optimizer": {
                "use": "AdamW",
                "lr": variant.rate,
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
    fit(module, config, batches(text, base.steps, seed), seed=seed, joining=joining)
    seconds = time.process_time() - start
    after = bits_per_character(module.eval(), judged)
    return Row(
        base=name,
        variant=variant.name,
        seed=seed,
        steps=base.steps,
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
    example = torch.zeros(2, WINDOW, dtype=torch.int64)
    for key, base in BASES.items():
        todo = [
            (seed, variant)
            for seed in range(SEEDS)
            for variant in base.variants
            if (name := _name(key, variant.name, seed)) not in rows
            and any(fnmatch.fnmatch(name, glob) for glob in options.only or ["*"])
        ]
        if not todo:
            continue
        model, _ = trained(text, cache, width=base.width, steps=base.before)
        program = fxc.capture(model, kwargs={"input_ids": example}, dynamic="batch")
        for seed, variant in todo:
            row = run(key, variant, seed, program, text)
            rows[row.name] = row
            write_rows(FILE, rows.values())
            print(f"{row.name}: {row.before:.4f} → {row.after:.4f}, {row.seconds} s", flush=True)


def render(rows: Iterable[Row]) -> str:
    """Return the page: of each base, means over seeds, then each seed's end."""
    lines = [
        "# Upcycling a language model of characters",
        "",
        f"`python -m benchmarks.moe.upcycle TEXT` on {machine()}.",
        "",
        "Causal transformers of 3 layers, trained on the King James Bible, go on for steps of"
        f" {BATCH} windows of {WINDOW} characters: as they are, or with all their feed-forward"
        " layers upcycled. All meet as many weights a token as the dense model, but for routers."
        " The same data in the same order for a seed, one recipe (AdamW along a cosine), and"
        " `load_balance` and `router_z` (0.001) for experts. Bits per character on"
        f" {JUDGED} windows of pieces that were held out. Busiest: the largest share of a layer's"
        " choices that one expert has at the end. Seconds are CPU seconds of one thread.",
    ]
    every = list(rows)
    for key, base in BASES.items():
        lines += _section(key, base, [row for row in every if row.base == key])
    return "\n".join(lines) + "\n"


def _section(key: str, base: Base, rows: Sequence[Row]) -> list[str]:
    lines = [
        "",
        f"## {key} parameters",
        "",
        f"Width {base.width}, {base.before:,} steps before and {base.steps:,} after,"
        f" `load_balance` of {base.balance:g}; {base.tuned}.",
        "",
        "| model | rate | parameters | active | start | end | by seed | busiest | s |",
        "|:--|--:|--:|--:|--:|--:|:--|--:|--:|",
    ]
    missing: list[str] = []
    for variant in base.variants:
        group = sorted((r for r in rows if r.variant == variant.name), key=lambda row: row.seed)
        done = [row.seed for row in group]
        missing += [f"{variant.name}, seed {n}" for n in range(SEEDS) if n not in done]
        if group:
            lines.append(_line(variant, group))
    if missing:
        lines += ["", f"Not run yet: {'; '.join(missing)}. A comparison needs all of a seed."]
    return lines


def _line(variant: Variant, group: Sequence[Row]) -> str:
    first = group[0]
    each = ", ".join(f"{row.after:.4f}" for row in group)
    busiest = [row.busiest for row in group if row.busiest is not None]
    return (
        f"| {variant.name} | {variant.rate:g} | {_count(first.parameters)} |"
        f" {_count(first.active)} | {mean(row.before for row in group):.4f} |"
        f" {mean(row.after for row in group):.4f} | {each} |"
        f" {f'{max(busiest):.0%}' if busiest else '–'} | {mean(row.seconds for row in group):.0f} |"
    )


def _count(number: int) -> str:
    return f"{number / 1e6:.2f} M" if number >= 1e6 else f"{number / 1e3:.0f} k"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moe.upcycle", description=__doc__)
    parser.add_argument(
        "text", nargs="?", type=Path, help="verses, one a line, after their references"
    )
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="keeps the trained model")
    parser.add_argument("--only", action="append", default=[], metavar="GLOB", help="names of rows")
    parser.add_argument("--render", action="store_true", help="only write the table again")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
