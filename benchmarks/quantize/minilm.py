"""What is left of MiniLM's sentence embeddings with weights of few bits, and with int8 throughout.

python -m benchmarks.quantize.minilm

Texts are pieces of newspaper editorials of 128 tokens; the calibration pieces are other ones.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks._common import RESULTS, machine
from fxcompress.ir import Program
from fxcompress.pipeline import Context
from fxcompress.rewrite import GraphRewriter
from fxcompress.spec import Spec, load_program, parse_steps

__all__ = ["Row", "agreement", "main", "render"]

SPECS: Final = Path(__file__).parents[2] / "specs"
FILE: Final = RESULTS / "quantize_minilm.json"
EVALUATE, CALIBRATION, WINDOW = 200, 200, 128
FORMATS: Final = (
    (8, None, ("rtn",)),
    (4, 32, ("rtn", "hqq", "awq", "gptq")),
    (4, 128, ("rtn", "hqq", "awq", "gptq")),
    (3, 64, ("rtn", "gptq")),
)
# Weights and activations in int8, ranges fixed by calibration.
_SMOOTH: Final = {"use": "quantize.smooth", "insert": True, "calibration": CALIBRATION}
_STATIC: Final = {"use": "quantize.static", "calibration": CALIBRATION}
_COVERING: Final = {**_STATIC, "activations": {"observer": "minmax"}}
STATIC: Final[Mapping[str, tuple[Mapping[str, Any], ...]]] = {
    "static": (_STATIC,),
    "static, min-max": (_COVERING,),
    "smooth, static": (_SMOOTH, _STATIC),
    "smooth, static, min-max": (_SMOOTH, _COVERING),
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


def _embed(program: Program, batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
    with torch.no_grad():
        return torch.cat([program(**batch) for batch in batches])


def _quantised(program: Program, entries: Sequence[Mapping[str, Any]], data: Any) -> Program:
    for parsed in parse_steps(entries):
        decision = parsed.pass_.decide(program, parsed.options, Context(data=data))
        rewriter = GraphRewriter(program)
        with torch.no_grad():
            parsed.pass_.rewrite(rewriter, decision)
        program = rewriter.finish()
    return program


def _methods() -> Iterator[tuple[Row, Sequence[Mapping[str, Any]]]]:
    """Yield every row, still without figures, and the passes that it takes."""
    for bits, group, methods in FORMATS:
        for method in methods:
            entry = {
                "use": "quantize.weight_only",
                "bits": bits,
                "group": group,
                "symmetric": bits == 8,
                "method": method,
                "search": "mse" if method == "awq" else "minmax",
                "calibration": CALIBRATION,
            }
            yield Row(bits, group, method, 0, 0, 0, 0), [entry]
    for method, entries in STATIC.items():
        yield Row(8, None, method, 0, 0, 0, 0, activations=8), entries


def main() -> int:
    """Measure every method and write the table."""
    torch.set_num_threads(1)
    program = load_program(Spec.load(SPECS / "minilm" / "spec.yaml"))
    ids = _texts()
    shown = _batches(ids[:EVALUATE])
    data = {"calibration": _batches(ids[EVALUATE : EVALUATE + CALIBRATION])}
    wanted = _embed(program, shown)
    rows = []
    for empty, entries in _methods():
        start = time.process_time()
        made = _quantised(program, entries, data)
        seconds = round(time.process_time() - start, 1)
        mean, least, neighbours = agreement(wanted, _embed(made, shown))
        row = replace(empty, mean=mean, least=least, neighbours=neighbours, seconds=seconds)
        print(row, flush=True)
        rows.append(row)
    document = {"format_version": "1.0", "rows": [asdict(row) for row in rows]}
    FILE.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "quantize_minilm.md").write_text(render(rows), encoding="utf-8")
    return 0


def render(rows: Sequence[Row]) -> str:
    """Return the page."""
    lines = [
        "# MiniLM's embeddings with weights of few bits, and with int8 throughout",
        "",
        f"`python -m benchmarks.quantize.minilm` on {machine()}.",
        "",
        f"all-MiniLM-L6-v2, its linear layers quantised, on {EVALUATE} pieces of newspaper"
        f" editorials of {WINDOW} tokens, against float32; calibration on {CALIBRATION} other"
        " pieces. Static is quantize.static, min-max its observer; smooth is quantize.smooth with"
        " `insert: true`, which adds 18 multiplications. Neighbours: the share of pieces whose"
        " nearest neighbour among the others is the same one. Seconds are CPU seconds of"
        " one thread for quantising.",
        "",
        "| weights | activations | method | cosine, mean | least | neighbours | s |",
        "|:--|:--|:--|--:|--:|--:|--:|",
    ]
    for row in rows:
        group = "channel" if row.group is None else f"g{row.group}"
        activations = "float" if row.activations is None else f"int{row.activations}"
        lines.append(
            f"| int{row.bits} {group} | {activations} | {row.method} | {row.mean:.4f} |"
            f" {row.least:.4f} | {row.neighbours:.0%} | {row.seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
