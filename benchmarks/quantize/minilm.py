"""What is left of MiniLM's sentence embeddings with weights of few bits, and with int8 throughout.

python -m benchmarks.quantize.minilm [--only GLOB] [--render]

Texts are pieces of newspaper editorials of 128 tokens; the calibration pieces are other ones. Each
row is written to results/quantize_minilm.json when it is done, and what is there is not run again.
Rows of a peer need its package (see `_peers.py`); without it they are left out.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from benchmarks._common import RESULTS, machine
from benchmarks.quantize import _peers
from fxcompress.ir import Program
from fxcompress.pipeline import Context
from fxcompress.rewrite import GraphRewriter
from fxcompress.spec import Spec, load_program, parse_steps
from fxcompress.spec.load_model import build_model

__all__ = ["Row", "agreement", "main", "render"]

SPECS: Final = Path(__file__).parents[2] / "specs"
FILE: Final = RESULTS / "quantize_minilm.json"
EVALUATE, CALIBRATION, WINDOW = 200, 200, 128
FORMATS: Final = (
    (8, None, ("rtn", "rtn, affine", "hqq, affine", "gptq, affine")),
    (4, 32, ("rtn", "hqq", "awq", "gptq", "rtn, bias", "gptq, bias")),
    (4, 128, ("rtn", "hqq", "awq", "gptq")),
    (3, 64, ("rtn", "gptq")),
)
PEERS: Final = (
    ("torchao", ((8, None), (4, 32), (4, 128))),
    ("nncf", ((8, None), (4, 32), (4, 128))),
)
# Weights and activations in int8, ranges fixed by calibration.
_SMOOTH: Final = {"use": "quantize.smooth", "insert": True, "calibration": CALIBRATION}
_STATIC: Final = {"use": "quantize.static", "calibration": CALIBRATION}
_BIAS: Final = {"use": "quantize.bias_correct", "calibration": CALIBRATION}
_COVERING: Final = {**_STATIC, "activations": {"observer": "minmax"}}
STATIC: Final[Mapping[str, tuple[Mapping[str, Any], ...]]] = {
    "static": (_STATIC,),
    "static, min-max": (_COVERING,),
    "static, bias": (_STATIC, _BIAS),
    "static, min-max, bias": (_COVERING, _BIAS),
    "smooth, static": (_SMOOTH, _STATIC),
    "smooth, static, min-max": (_SMOOTH, _COVERING),
    "smooth, static, min-max, bias": (_SMOOTH, _COVERING, _BIAS),
}


@dataclass(frozen=True)
class Row:
    """A method: cosine to the float embeddings, and texts whose nearest neighbour is the same.

    Attributes:
        bits: Of weights.
        group: Weights that share a scale; None for an output channel.
        method: How they are quantised.
        mean: Mean cosine.
        least: The least.
        neighbours: Share of texts with the same nearest neighbour.
        seconds: CPU seconds for quantising.
        activations: Bits of activations; None for float.
    """

    bits: int
    group: int | None
    method: str
    mean: float
    least: float
    neighbours: float
    seconds: float
    activations: int | None = None

    @property
    def name(self) -> str:
        """What `--only` calls it."""
        return f"{self.form} {self.method}"

    @property
    def form(self) -> str:
        """The weights."""
        return f"int{self.bits} {'channel' if self.group is None else f'g{self.group}'}"


def agreement(wanted: Tensor, got: Tensor) -> tuple[float, float, float]:
    """Return mean and least cosine of `[texts, features]`, and the share of equal neighbours."""
    wanted, got = F.normalize(wanted, dim=1), F.normalize(got, dim=1)
    cosine = (wanted * got).sum(dim=1)
    nearest = [(each @ each.T).fill_diagonal_(-1).argmax(dim=1) for each in (wanted, got)]
    same = (nearest[0] == nearest[1]).float().mean()
    return float(cosine.mean()), float(cosine.min()), float(same)


def _module(path: Path) -> Any:
    """Load a Python file of the examples, which are no package."""
    spec = spec_from_file_location(f"specs_{path.stem}", path)
    assert spec is not None and spec.loader is not None, "a Python file"  # noqa: PT018
    made = module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def _texts() -> Tensor:
    """Return token ids `[pieces, window]`, each with the marks of beginning and end."""
    vader: Any = _module(SPECS / "_vader.py")
    model: Any = _module(SPECS / "minilm" / "model.py")
    tokenizer = Tokenizer.from_file(str(model.folder() / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = tokenizer.encode("\n\n".join(vader.editorials()))
    first, *inner, last = ids.ids
    size = WINDOW - 2
    pieces = [inner[i : i + size] for i in range(0, len(inner) - size, size)]
    return torch.tensor([[first, *piece, last] for piece in pieces])


def _batches(ids: Tensor) -> list[Mapping[str, Tensor]]:
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part)}
        for part in torch.split(ids, 20)
    ]


def _embed(model: Program | nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(**batch) for batch in batches])


def _quantised(program: Program, entries: Sequence[Mapping[str, Any]], data: Any) -> Program:
    context = Context(data=data, original=program)
    for parsed in parse_steps(entries):
        decision = parsed.pass_.decide(program, parsed.options, context)
        rewriter = GraphRewriter(program)
        with torch.no_grad():
            parsed.pass_.rewrite(rewriter, decision)
        program = rewriter.finish()
    return program


def _methods() -> Iterator[tuple[Row, Sequence[Mapping[str, Any]]]]:
    """Yield every row, still without figures, and the passes that it takes; none for a peer."""
    for bits, group, methods in FORMATS:
        for name in methods:
            method, _, form = name.partition(", ")
            entry = {
                "use": "quantize.weight_only",
                "bits": bits,
                "group": group,
                "symmetric": bits == 8 and form != "affine",
                "method": method,
                "search": "mse" if method == "awq" else "minmax",
                "calibration": CALIBRATION,
            }
            bias = [{**_BIAS, "reference": "original"}] if form == "bias" else []
            yield Row(bits, group, name, 0, 0, 0, 0), [entry, *bias]
    for method, entries in STATIC.items():
        yield Row(8, None, method, 0, 0, 0, 0, activations=8), entries
    for peer, formats in PEERS:
        for bits, group in formats:
            yield Row(bits, group, peer, 0, 0, 0, 0), ()


class _Bench:
    def __init__(self) -> None:
        self.spec = Spec.load(SPECS / "minilm" / "spec.yaml")
        self.program = load_program(self.spec)
        ids = _texts()
        self.shown = _batches(ids[:EVALUATE])
        self.data = {"calibration": _batches(ids[EVALUATE : EVALUATE + CALIBRATION])}
        self.wanted = _embed(self.program, self.shown)

    def run(self, empty: Row, entries: Sequence[Mapping[str, Any]]) -> Row | None:
        """Return a row with its figures; None where its peer is not installed."""
        start = time.process_time()
        made: Program | nn.Module | None
        if entries:
            made = _quantised(self.program, entries, self.data)
        else:
            build, data = partial(build_model, self.spec), self.data["calibration"]
            made = _peers.quantise(empty.method, build, empty.bits, empty.group, data)
        if made is None:
            return None
        seconds = round(time.process_time() - start, 1)
        mean, least, neighbours = agreement(self.wanted, _embed(made, self.shown))
        return replace(empty, mean=mean, least=least, neighbours=neighbours, seconds=seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the methods that are missing and write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantize.minilm", description=__doc__
    )
    parser.add_argument("--only", action="append", default=[], metavar="GLOB", help="names of rows")
    parser.add_argument("--render", action="store_true", help="only write the table again")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = _read()
    if not options.render:
        _run(rows, options.only or ["*"])
    (RESULTS / "quantize_minilm.md").write_text(render(rows.values()), encoding="utf-8")
    return 0


def _run(rows: dict[str, Row], only: Sequence[str]) -> None:
    bench = _Bench()
    for empty, entries in _methods():
        if empty.name in rows or not any(fnmatch.fnmatch(empty.name, each) for each in only):
            continue
        row = bench.run(empty, entries)
        if row is not None:
            print(row, flush=True)
            rows.update({**_read(), row.name: row})
            document = {"format_version": "1.0", "rows": [asdict(each) for each in rows.values()]}
            FILE.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _read() -> dict[str, Row]:
    if not FILE.exists():
        return {}
    entries = json.loads(FILE.read_text(encoding="utf-8"))["rows"]
    return {row.name: row for row in (Row(**entry) for entry in entries)}


def render(rows: Iterable[Row]) -> str:
    """Return the page: by format, weights in float activations first, from the best."""
    lines = [
        "# MiniLM's embeddings with weights of few bits, and with int8 throughout",
        "",
        f"`python -m benchmarks.quantize.minilm` on {machine()}.",
        "",
        f"all-MiniLM-L6-v2, its linear layers quantised, on {EVALUATE} pieces of newspaper"
        f" editorials of {WINDOW} tokens, against float32; calibration on {CALIBRATION} other"
        " pieces. Integers of 8 bits are symmetric unless affine is said, those of fewer bits are"
        " affine. Static is quantize.static, min-max its observer; smooth is quantize.smooth with"
        " `insert: true`, which adds 18 multiplications; bias is quantize.bias_correct. torchao"
        " rounds to nearest; nncf takes affine int8 and rounds the embeddings, too, and at 4 bits"
        " AWQ and scale estimation."
        " Neighbours: the share of pieces whose nearest neighbour among the others is the same"
        " one. Seconds are CPU seconds of one thread for quantising.",
        "",
        "| weights | activations | method | cosine, mean | least | neighbours | s |",
        "|:--|:--|:--|--:|--:|--:|--:|",
    ]
    for row in sorted(rows, key=lambda r: (r.activations or 0, -r.bits, r.group or 0, -r.mean)):
        activations = "float" if row.activations is None else f"int{row.activations}"
        lines.append(
            f"| {row.form} | {activations} | {row.method} | {row.mean:.5f} |"
            f" {row.least:.5f} | {row.neighbours:.1%} | {row.seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
