"""MiniLM quantised at run time in onnxruntime: ours against its own `quantize_dynamic`, and fp32.

python -m benchmarks.quantize.dynamic [--repeats 40] [--paragraphs 60]

Speed: one sequence of 128 tokens, sessions in turns in one process on one thread. Faithfulness: the
cosine of each paragraph's embedding to that of fp32; the paragraphs open editorials of the New York
Times, 128 tokens each. Needs the package of specs/minilm, and a CPU with VNNI for the speed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

import fxcompress as fxc
from benchmarks._common import interleaved, median, write_table
from benchmarks._onnxruntime import session
from fxcompress.emit import emit
from fxcompress.emit.kernels import LINEAR_KERNELS, integer_kernels

SPECS = Path(__file__).parents[2] / "specs"
TOKENS = 128
OURS: Mapping[str, Mapping[str, Any]] = {
    "fxcompress, per token": {"per": "token"},
    "fxcompress, per token, symmetric": {"per": "token", "symmetric": True},
    "fxcompress, per tensor": {"per": "tensor"},
}
Feed = dict[str, "np.ndarray[Any, Any]"]


def load(path: str) -> ModuleType:
    """Load a file of the examples, which are no package."""
    spec = spec_from_file_location("specs_" + path.replace("/", "_"), SPECS / f"{path}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def paragraphs(count: int) -> list[Feed]:
    """Return the first 128 tokens of editorials that have as many."""
    from tokenizers import Tokenizer

    folder = load("minilm/model").folder()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.no_padding()
    ids = [each.ids for each in tokenizer.encode_batch(load("_vader").editorials())]
    full = [np.array([each]) for each in ids if len(each) == TOKENS][:count]
    return [{"input_ids": each, "attention_mask": np.ones_like(each)} for each in full]


def our_files(folder: Path) -> dict[str, Path]:
    """Emit the encoder in fp32 and in every variant."""
    example = {
        "input_ids": torch.randint(0, 30000, (2, 32)),
        "attention_mask": torch.ones(2, 32, dtype=torch.int64),
    }
    sizes = {name: {0: "batch", 1: "seq"} for name in example}
    program = fxc.capture(load("minilm/model").encoder(), kwargs=example, dynamic=sizes)
    (fp32,) = emit(program, folder / "fp32", ["onnx"], example_inputs=example)
    files = {"fp32": fp32.path}
    for place, (name, activations) in enumerate(OURS.items()):
        step = {"use": "quantize.dynamic", "activations": activations}
        made = fxc.compress(program, [step]).program
        (artefact,) = emit(made, folder / str(place), ["onnx"], example_inputs=example)
        print(f"{name}: {'; '.join(artefact.notes)}")
        files[name] = artefact.path
    return files


def their_files(fp32: Path, folder: Path) -> dict[str, Path]:
    """Quantise with onnxruntime, weights per tensor (its default) and per channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    files = {}
    for per_channel in (False, True):
        path = folder / f"theirs-{per_channel}.onnx"
        quantize_dynamic(str(fp32), str(path), per_channel=per_channel, weight_type=QuantType.QInt8)
        name = "onnxruntime quantize_dynamic"
        files[f"{name}, per channel" if per_channel else name] = path
    return files


def cosines(run: Any, reference: Any, feeds: list[Feed]) -> list[float]:
    """Return the cosine of each paragraph's embedding to the reference's."""
    found = []
    for feed in feeds:
        a, b = (each.run(None, feed)[0].ravel().astype(np.float64) for each in (run, reference))
        found.append(float(a @ b / np.sqrt((a @ a) * (b @ b))))
    return found


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--paragraphs", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    feeds = paragraphs(options.paragraphs)
    with tempfile.TemporaryDirectory() as name:
        paths = our_files(Path(name))
        paths.update(their_files(paths["fp32"], Path(name)))
        sizes = {n: path.stat().st_size / 1e6 for n, path in paths.items()}
        kernels = {n: integer_kernels(path) for n, path in paths.items()}
        sessions = {n: session(path) for n, path in paths.items()}
    calls = {n: (lambda s=s: s.run(None, feeds[0])) for n, s in sessions.items()}
    times = interleaved(calls, options.repeats, warmup=3)
    medians = {n: median(values) for n, values in times.items()}
    near = {n: cosines(s, sessions["fp32"], feeds) for n, s in sessions.items()}
    theirs = medians["onnxruntime quantize_dynamic"]
    rows = [
        (
            n,
            f"{np.mean(near[n]):.4f} ({min(near[n]):.4f})",
            f"{medians[n] * 1e3:.2f}",
            f"{min(times[n]) * 1e3:.2f}",
            f"{medians['fp32'] / medians[n]:.2f}",
            f"{theirs / medians[n]:.3f}",
            sum(kernels[n][kernel] for kernel in LINEAR_KERNELS),
            f"{sizes[n]:.1f}",
        )
        for n in paths
    ]
    write_table(
        "quantize_dynamic",
        "MiniLM quantised at run time in onnxruntime",
        f"python -m benchmarks.quantize.dynamic --repeats {options.repeats}"
        f" --paragraphs {options.paragraphs}",
        (
            "file",
            "cosine to fp32, mean (min)",
            "CPU ms, median",
            "min",
            "× fp32",
            "× quantize_dynamic",
            "integer kernels",
            "MB",
        ),
        rows,
        f"Batch 1, {TOKENS} tokens, one thread, {options.repeats} interleaved repeats; cosines on "
        f"{len(feeds)} editorials. Goals: more than 0.9976 (torchao, per token), and at least "
        "0.98 × quantize_dynamic, which rounds the 47 MB of word vectors too.",
    )


if __name__ == "__main__":
    main()
