"""Time and accuracy of a model with early exits, beside the model without.

python -m benchmarks.depth.early_exit RUN

RUN is the folder that `fxcompress run specs/early_exit/spec.yaml --output RUN` wrote: what is timed
are the files that it emitted. About 4 CPU-minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

import torch
from torch import Tensor

from benchmarks._common import write_table
from benchmarks.depth._sides import FORMATS, Call, call_of, call_of_program, originals, timings
from fxcompress.emit.driver import write_unproved
from fxcompress.ir import Program
from fxcompress.ir.ops import module_of, op_name
from fxcompress.nn import Exit
from fxcompress.rewrite import at_exit, early_exits
from fxcompress.spec import Spec, load_data, load_program
from fxcompress.spec.load_teacher import load_teacher

__all__ = ["main"]

SPEC = Path(__file__).parents[2] / "specs" / "early_exit" / "spec.yaml"
SIZES = {1: 100, 16: 6, 64: 3}
REPEATS = 7
NAMES = ("original", "model", "together", "model.exit_0", "model.exit_1")
TITLES = {"model": "exits", "together": "exits, `batch: together`"}


def main() -> None:
    """Time all files, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run.resolve()
    folder = run / "artifacts"
    spec = Spec.load(SPEC)
    data: list[Any] = list(load_data(spec)["eval"])
    images = torch.cat([batch[0] for batch, _ in data])
    labels = torch.cat([target for _, target in data])
    result = load_teacher(run.parent, run=run.name)
    whole = _stopping(result, "together")
    programs = {"original": load_program(spec), "model": result, "together": whole}
    programs |= {f"model.{e.name}": at_exit(result, e.name) for e in early_exits(result)}
    eager = {name: call_of_program(each) for name, each in programs.items()}
    rows = _rows("eager PyTorch", eager, images, labels)
    with TemporaryDirectory() as made:
        first = originals(spec, Path(made))
        for name, title in FORMATS.items():
            write_unproved(whole, Path(made) / "together", name)
            files = {each: folder / f"{each}.{name}" for each in NAMES}
            files |= {
                "original": first[name],
                "together": Path(made) / "together" / f"model.{name}",
            }
            calls = {key: call_of(path) for key, path in files.items() if path.exists()}
            rows += _rows(title, calls, images, labels)
    write_table(
        "depth_early_exit",
        "Early exits: accuracy and time",
        "python -m benchmarks.depth.early_exit RUN",
        ["runtime", "what runs", "accuracy", *_columns()],
        rows,
        notes=__notes__,
    )


__notes__ = (
    "A vision transformer of 6 blocks on Fashion-MNIST (`specs/early_exit`): accuracy on all "
    "10,000 test images in onnxruntime, in batches of 250. CPU time on one thread: "
    + ", ".join(f"{count} batches of {size}" for size, count in SIZES.items())
    + f", {REPEATS} times, all sides in turns; `faster` is the median of the ratios to the "
    "original. `exits` chooses for each image, and what follows an exit runs on the images that go "
    "on; with `batch: together` a batch stops early only where all of its images may. `exit_0` and "
    "`exit_1` always stop after blocks 1 and 3, counted from 0. Eager PyTorch is "
    "`fxcompress.emit.eager_module`, which branches in Python. A file of torch.export runs what "
    "follows an exit on no image where all stop; `together` is `torch.cond` there, which alone "
    "costs more than it saves on so small a model."
)


def _columns() -> list[str]:
    # Equal heads would be one column, so the second `faster` has a space after it, and so on.
    heads = []
    for place, size in enumerate(SIZES):
        heads += [f"{size} image{'s' * (size > 1)}, ms", "faster" + " " * place]
    return heads


def _stopping(program: Program, batch: Literal["each", "together"]) -> Program:
    """Return a Program whose exits let samples leave a batch so."""
    changed = program.copy()
    for node in changed.nodes:
        if op_name(node) == "exit":
            cast(Exit, module_of(node)).batch = batch
    return changed


def _rows(title: str, calls: dict[str, Call], images: Tensor, labels: Tensor) -> list[list[object]]:
    found = {
        size: timings(calls, [images[i * size : (i + 1) * size] for i in range(count)], REPEATS)
        for size, count in SIZES.items()
    }
    rows: list[list[object]] = []
    for name, call in calls.items():
        right = _accuracy(call, images, labels) if title == FORMATS["onnx"] else ""
        row: list[object] = [title, TITLES.get(name, name.removeprefix("model.")), right]
        for each in found.values():
            row += [f"{each[name].ours:.2f}", f"{each[name].ratio:.2f}×"]
        rows.append(row)
    return rows


def _accuracy(call: Call, images: Tensor, labels: Tensor) -> str:
    found = torch.cat([call(images[i : i + 250]) for i in range(0, len(images), 250)])
    return f"{float((found.argmax(1) == labels).double().mean()):.2%}"


if __name__ == "__main__":
    main()
