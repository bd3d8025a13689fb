"""Mixed precision against one width for all layers, at the same size.

python -m benchmarks.quantize.mixed [--only MODEL]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

import torch

from benchmarks._common import RESULTS, machine
from benchmarks.quantize._rounded import Bench

__all__ = ["main", "render"]

FILE = RESULTS / "quantize_mixed.json"
CHOICES: Final = [2, 3, 4, 5, 6, 8, 16]
SENSITIVITIES: Final = ("output", "sqnr", "hessian", "metric")
# On MiniLM the metric is not measured layer by layer: each takes 2,000 reviews.
WITHOUT_METRIC: Final = ("minilm",)
# Example, batches of its evaluation split (all: None), calibration samples.
MODELS: Final[Mapping[str, tuple[str, int | None, int]]] = {
    "ResNet-8, digits": ("digits", None, 256),
    "ResNet-14, Fashion-MNIST": ("fashion_mnist", 4, 128),
    "ViT, digits": ("vit_heads", None, 256),
    "MiniLM, film reviews": ("minilm", None, 8),
}
FORMATS: Final[Mapping[str, tuple[int | None, Sequence[int]]]] = {
    "weights": (None, (3, 4)),
    "weights, 8-bit activations": (8, (3, 4)),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantize.mixed")
    parser.add_argument("--only", action="append", default=[], metavar="MODEL")
    parser.add_argument("--render", action="store_true", help="only write the table again")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = json.loads(FILE.read_text())["rows"] if FILE.exists() else []
    for model in MODELS:
        if not options.render and (not options.only or model.split(",")[0] in options.only):
            _fill(rows, model)
    (RESULTS / "quantize_mixed.md").write_text(render(rows), encoding="utf-8")
    return 0


def _fill(rows: list[dict[str, Any]], model: str) -> None:
    """Add the rows of a model that are not there yet; each is written when it is done."""
    name, batches, samples = MODELS[model]
    bench = Bench(name, batches)
    done = {(row["format"], row["bits"]): row["bytes"] for row in rows if row["model"] == model}

    def note(form: str, how: str, entry: Mapping[str, Any] | None) -> int:
        if (form, how) not in done:
            made, seconds = (bench.program, 0.0) if not entry else bench.run(bench.program, entry)
            figures = bench.figures(made, seconds)
            rows.append({"model": model, "format": form, "bits": how, **asdict(figures)})
            FILE.write_text(json.dumps({"format_version": "1.0", "rows": rows}, indent=1) + "\n")
            print(rows[-1], flush=True)
            done[form, how] = figures.bytes
        return int(done[form, how])

    note("float32", "–", None)
    for form, (activations, widths) in FORMATS.items():
        if activations and name == "minilm":
            # Its static activations lose far more than the weights do: nothing to compare.
            continue
        for bits in widths:
            plain = _entry(activations, samples)
            whole = {"budget": {"size": "100%"}, "choices": [bits], "sensitivity": "sqnr"}
            size = note(form, f"{bits} for all", {**plain, **whole})
            for each in SENSITIVITIES:
                if each == "metric" and name in WITHOUT_METRIC:
                    continue
                entry = {**plain, "budget": {"size": f"{size}B"}, "choices": CHOICES}
                note(form, f"mixed as {bits}, {each}", {**entry, "sensitivity": each})


def _entry(activations: int | None, samples: int) -> dict[str, Any]:
    entry: dict[str, Any] = {"use": "quantize.mixed", "calibration": samples}
    if activations:
        entry["activations"] = {"bits": activations}
    return entry


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the page."""
    lines = [
        "# Mixed precision against one width for all layers",
        "",
        f"`python -m benchmarks.quantize.mixed` on {machine()}.",
        "",
        "Every row `mixed as N` has at most the size of `N for all`: one scale and zero point per"
        " output channel, rounding to nearest, ranges clipped for the least squared error; choices"
        f" {', '.join(map(str, CHOICES[:-1]))} bits and float. The name behind it is the"
        " sensitivity. Metric (accuracy; of a linear probe for MiniLM), SQNR and cosine against"
        " the float model are of the evaluation split (1,000 images of Fashion-MNIST, 2,000"
        " reviews for MiniLM); sensitivities of calibration samples. Seconds are CPU seconds of one"
        " thread for the decision.",
        "",
        "| model | quantised | bits | KiB | metric | SQNR, dB | cosine | s |",
        "|:--|:--|:--|--:|--:|--:|--:|--:|",
    ]
    order = {model: index for index, model in enumerate(MODELS)}
    for row in sorted(rows, key=lambda row: order[row["model"]]):
        sqnr = "–" if row["format"] == "float32" else f"{row['sqnr']:.1f}"
        lines.append(
            f"| {row['model']} | {row['format']} | {row['bits']} | {row['bytes'] / 1024:,.1f} |"
            f" {row['metric']:.2%} | {sqnr} | {row['cosine']:.4f} |"
            f" {'–' if ' for all' in row['bits'] else row['seconds'] or '–'} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
