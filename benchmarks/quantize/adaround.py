"""Learned rounding beside rounding to nearest and GPTQ, on the same grids of few bits.

python -m benchmarks.quantize.adaround
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

FILE = RESULTS / "quantize_adaround.json"
MODELS: Final[Mapping[str, tuple[str, int]]] = {
    "ResNet-8, digits": ("digits", 256),
    "ViT, digits": ("vit_heads", 256),
}
BITS: Final = (2, 3, 4)
METHODS: Final[Mapping[str, Mapping[str, Any] | None]] = {
    "to nearest": None,
    "adaround, layers": {"unit": "layer"},
    "adaround, blocks": {"unit": "block"},
    "adaround, blocks, weighted": {"unit": "block", "weighted": True},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantize.adaround")
    parser.add_argument("--render", action="store_true", help="only write the table again")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = json.loads(FILE.read_text())["rows"] if FILE.exists() else []
    for model, (name, samples) in MODELS.items() if not options.render else ():
        _fill(rows, model, Bench(name), samples)
    (RESULTS / "quantize_adaround.md").write_text(render(rows), encoding="utf-8")
    return 0


def _fill(rows: list[dict[str, Any]], model: str, bench: Bench, samples: int) -> None:
    done = {(row["model"], row["format"], row["bits"], row["method"]) for row in rows}

    def note(form: str, bits: int, method: str, entry: Mapping[str, Any], start: Any) -> Any:
        key = (model, form, bits, method)
        if key in done:
            return None
        made, seconds = bench.run(start, entry)
        figures = asdict(bench.figures(made, seconds))
        rows.append(dict(zip(("model", "format", "bits", "method"), key, strict=True)) | figures)
        FILE.write_text(json.dumps({"format_version": "1.0", "rows": rows}, indent=1) + "\n")
        print(rows[-1], flush=True)
        return made

    for bits in BITS:
        for form, first in _first(bits, samples).items():
            if all((model, form, bits, method) in done for method in METHODS):
                continue
            nearest, _ = bench.run(bench.program, first)
            for method, options in METHODS.items():
                if options is None:
                    note(form, bits, method, first, bench.program)
                else:
                    entry = {"use": "quantize.adaround", "calibration": samples, **options}
                    note(form, bits, method, entry, nearest)
        gptq = {"use": "quantize.weight_only", "bits": bits, "group": None, "method": "gptq"}
        note("weights", bits, "gptq", {**gptq, "calibration": samples}, bench.program)


def _first(bits: int, samples: int) -> dict[str, dict[str, Any]]:
    """Return the passes that put the quantizers in, by what they quantise."""
    weights = {"use": "quantize.mixed", "budget": {"size": "100%"}, "choices": [bits]}
    static = {"use": "quantize.static", "weights": {"bits": bits, "observer": "mse"}}
    return {
        "weights": {**weights, "calibration": samples},
        "weights, 8-bit activations": {**static, "calibration": samples},
    }


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the page."""
    lines = [
        "# Learned rounding",
        "",
        f"`python -m benchmarks.quantize.adaround` on {machine()}.",
        "",
        "All layers in one width, a scale per output channel clipped for the least squared error."
        " Weights alone are affine, with 8-bit activations symmetric. `gptq` fits the scales again"
        " after rounding; learned rounding keeps them. Calibration on 256 training images; accuracy"
        " and SQNR against the float model on the 597 images of the evaluation split (float:"
        " 98.66 % for the ResNet). Seconds are CPU seconds of one thread for the decision.",
        "",
        "| model | quantised | bits | rounding | accuracy | SQNR, dB | s |",
        "|:--|:--|--:|:--|--:|--:|--:|",
    ]
    methods = [*METHODS, "gptq"]
    order = {model: index for index, model in enumerate(MODELS)}
    for row in sorted(
        rows,
        key=lambda r: (order[r["model"]], r["format"], r["bits"], methods.index(r["method"])),
    ):
        lines.append(
            f"| {row['model']} | {row['format']} | {row['bits']} | {row['method']} |"
            f" {row['metric']:.2%} | {row['sqnr']:.1f} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
