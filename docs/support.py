"""Measure which pass runs how in which runtime, and write docs/support.md: `make support`.

Every cell is a run: a small model goes through the pass, is emitted in the format, reloaded in a
fresh process by its runtime, compared, and its kernels are counted there.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxcompress as fxc
from fxcompress.emit import EmitOptions, OnnxOptions, Pt2Options, emit
from fxcompress.errors import FxCompressError

PAGE = Path(__file__).with_name("support.md")
DATA = PAGE.with_suffix(".json")
Step = Mapping[str, Any]

# Heading -> the format, and its options.
COLUMNS: Mapping[str, tuple[str, EmitOptions]] = {
    "python": ("python", EmitOptions()),
    "pt2": ("pt2", EmitOptions()),
    "pt2, decomposed": ("pt2", EmitOptions(pt2=Pt2Options(quantized="decomposed"))),
    "onnxruntime": ("onnx", EmitOptions()),
    "TensorRT (structure)": ("onnx", EmitOptions(onnx=OnnxOptions(target="tensorrt"))),
    "openvino": ("openvino", EmitOptions()),
    "executorch": ("executorch", EmitOptions()),
    "inductor": ("inductor", EmitOptions()),
}
# What `target:` of a static placement is for a column.
TARGETS = {
    "onnxruntime": "onnxruntime",
    "TensorRT (structure)": "tensorrt-qdq",
    "openvino": "openvino",
    "executorch": "executorch",
    "inductor": "inductor",
}
# The same for 8-bit floats, which other targets refuse when the spec is read.
FLOAT_TARGETS = {"TensorRT (structure)": "tensorrt-qdq"}
INT4 = {"bits": 4, "group": 32}
SMALL = {"iterations": 20, "calibration": 8}
# Row -> its passes; TARGET and FLOATS stand for the placement of the column.
ROWS: Mapping[str, tuple[Step, ...]] = {
    "float32": (),
    "quantize.static": ({"use": "quantize.static", "target": "TARGET", "calibration": 8},),
    "quantize.static, float8_e4m3": (
        {"use": "quantize.static", "target": "FLOATS", "dtype": "float8_e4m3", "calibration": 8},
    ),
    "quantize.qat": ({"use": "quantize.qat", "target": "TARGET", "calibration": 8},),
    "quantize.smooth, static": (
        {"use": "quantize.smooth", "calibration": 8},
        {"use": "quantize.static", "target": "TARGET", "calibration": 8},
    ),
    "quantize.equalize, static": (
        {"use": "quantize.equalize"},
        {"use": "quantize.static", "target": "TARGET", "calibration": 8},
    ),
    "quantize.static, bias_correct": (
        {"use": "quantize.static", "target": "TARGET", "calibration": 8},
        {"use": "quantize.bias_correct", "calibration": 8},
    ),
    "quantize.static, adaround": (
        {"use": "quantize.static", "target": "TARGET", "calibration": 8},
        {"use": "quantize.adaround", **SMALL},
    ),
    "quantize.dynamic": ({"use": "quantize.dynamic"},),
    "quantize.dynamic, LSTM": ({"use": "quantize.dynamic"},),
    "quantize.weight_only, int8": ({"use": "quantize.weight_only", "bits": 8},),
    "quantize.weight_only, int4": ({"use": "quantize.weight_only", **INT4},),
    "quantize.mixed": (
        {"use": "quantize.mixed", "budget": {"size": "18%"}, "choices": [4, 8], "calibration": 8},
    ),
    "quantize.binary": ({"use": "quantize.binary"},),
    "quantize.ternary": ({"use": "quantize.ternary"},),
    "tidy.cast, bfloat16": ({"use": "tidy.cast", "dtype": "bfloat16"},),
    "tidy.cast, float8_e4m3": ({"use": "tidy.cast", "dtype": "float8_e4m3"},),
}
_COUNT = re.compile(r"^(\d+) of (\d+) (convolutions|linear layers|recurrent layers)\b.*")
_FEW_BITS = re.compile(r"^(\d+) linear layers are MatMulNBits")
_SHORT = {"convolutions": "conv", "linear layers": "linear", "recurrent layers": "LSTM"}


class Net(nn.Module):
    """Convolutions, an add, a pool and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.inner = nn.Conv2d(32, 32, 3, padding=1)
        self.hidden = nn.Linear(512, 256)
        self.head = nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (self.inner(x) + x).relu()
        x = torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)
        return self.head(self.hidden(x).relu())


class Recurrent(nn.Module):
    """An LSTM and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(64, 64, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def program_and_data(row: str) -> tuple[fxc.Program, torch.Tensor]:
    """Return the small model of a row, and calibration data."""
    torch.manual_seed(0)
    recurrent = row.endswith("LSTM")
    model = Recurrent() if recurrent else Net()
    inputs = torch.randn(*((8, 12, 64) if recurrent else (8, 3, 16, 16)))
    program = fxc.capture(model.eval(), (inputs[:2],))
    if row not in ("quantize.binary", "quantize.qat", "float32"):
        if not recurrent:
            program = fxc.compress(program, [{"use": "tidy.fold_batchnorm"}]).program
    return program, inputs


def steps_of(row: str, column: str) -> list[dict[str, Any]]:
    """Return the passes of a row, placed for a column."""
    made = []
    for step in ROWS[row]:
        placed = dict(step)
        if placed.get("target") == "TARGET":
            placed["target"] = TARGETS.get(column, "generic")
        elif placed.get("target") == "FLOATS":
            placed["target"] = FLOAT_TARGETS.get(column, "generic")
        made.append(placed)
    if row == "quantize.qat":
        made.append({"use": "tidy.fold_batchnorm"})
    return made


def cell(row: str, column: str, folder: Path) -> dict[str, Any]:
    """Return what came of one row in one column: `text`, and bytes where there is an artefact."""
    program, inputs = program_and_data(row)
    steps = steps_of(row, column)
    data = {"calibration": [(inputs,)]}
    format_, options = COLUMNS[column]
    try:
        made = fxc.compress(program, steps, data=data).program if steps else program
        (artefact,) = emit(made, folder, [format_], example_inputs=(inputs[:2],), options=options)
    except FxCompressError as error:
        return {"text": f"refused: {error.what}"}
    counts = [_COUNT.match(note) for note in artefact.notes]
    kernels = [f"{_SHORT[m[3]]} {m[1]}/{m[2]}" for m in counts if m]
    whole = "integers: " + ", ".join(kernels) if any(m and m[1] != "0" for m in counts) else "float"
    few = [match for note in artefact.notes if (match := _FEW_BITS.match(note))]
    if few:
        whole = f"4-bit weights: linear {few[0][1]}"
    if row.endswith("LSTM") and whole.startswith("integers") and "LSTM" not in whole:
        whole += ", LSTM in float"
    if column.startswith("TensorRT"):
        whole = "QDQ" if row != "float32" else "float"
    return {"text": whole, "bytes": artefact.bytes}


def measure(rows: Sequence[str], columns: Sequence[str]) -> Iterator[tuple[str, str, Any]]:
    """Yield each cell."""
    for row in rows:
        for column in columns:
            with tempfile.TemporaryDirectory() as folder:
                yield row, column, cell(row, column, Path(folder))


def page(table: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the whole page."""
    columns = list(COLUMNS)
    lines = [
        "# Passes and runtimes",
        "",
        "Every cell was run: a small model (convolutions, an add, a pool and linear layers; an "
        "LSTM where the row says so) went through the passes, was emitted, reloaded in a fresh "
        "process by the runtime and compared. `integers: conv 2/2` says that 2 of 2 convolutions "
        "run as integer kernels there; `4-bit weights: linear 2`, that the kernels of 2 linear "
        "layers read integers of weights and floats of activations; `float`, that the integers "
        "are only stored and everything is computed in floats; the percentage is the file's size "
        "over that of float32 in the same format. TensorRT does not run here: its ONNX is "
        "checked for the structure that it accepts. `make support` runs it all again; tests hold "
        "every cell to what it says.",
        "",
        "| | " + " | ".join(columns) + " |",
        "|:--|" + "|".join(":--" for _ in columns) + "|",
    ]
    for row, cells in table.items():
        texts = []
        for column in columns:
            found = cells.get(column, {"text": "not measured"})
            text = str(found["text"])
            if "bytes" in found and row != "float32":
                base = table["float32"][column]["bytes"]
                text += "" if row.endswith("LSTM") else f", {100 * found['bytes'] / base:.0f} %"
            texts.append(text)
        lines.append(f"| {row} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the rows and columns asked for (all by default), and write the page and its data."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--row", action="append", choices=list(ROWS), metavar="ROW")
    parser.add_argument("--column", action="append", choices=list(COLUMNS), metavar="COLUMN")
    chosen = parser.parse_args()
    table = json.loads(DATA.read_text()) if DATA.exists() else {}
    rows, columns = chosen.row or list(ROWS), chosen.column or list(COLUMNS)
    for row, column, found in measure(rows, columns):
        print(f"{row} | {column} | {found}", flush=True)
        table.setdefault(row, {})[column] = found
        table = {name: table[name] for name in ROWS if name in table}
        DATA.write_text(json.dumps(table, indent=1) + "\n")
    PAGE.write_text(page(table), encoding="utf-8")


if __name__ == "__main__":
    main()
