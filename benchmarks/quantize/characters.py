"""Bits per character of a small language model with weights of few bits, beside peers.

python -m benchmarks.quantize.characters TEXT [--cache FOLDER] [--only GLOB] [--render]

A causal transformer of 2.4 million parameters is trained on the King James Bible first, in 8
CPU-minutes; with `--cache` only once. TEXT comes from Debian's packages `bible-kjv` and
`bible-kjv-text`, which need not be installed:

    apt-get download bible-kjv bible-kjv-text
    dpkg -x bible-kjv_*.deb kjv && dpkg -x bible-kjv-text_*.deb kjv
    (cd kjv/usr/lib && ../bin/bible -f gen1:1-rev22:21) > kjv.txt

Each row is written to results/quantize_characters.json when it is done, and what is there is not
run again. Rows of a peer need its package (see `_peers.py`); without it they are left out.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch

import fxcompress as fxc
from benchmarks._common import RESULTS, machine, read_rows, write_rows
from benchmarks.quantize import _peers
from benchmarks.quantize._characters import bits_per_character, calibration, read_text, trained
from fxcompress.analysis.cost import cost
from fxcompress.ir import Program
from fxcompress.pipeline import Context
from fxcompress.rewrite import GraphRewriter
from fxcompress.spec import parse_steps

__all__ = ["Row", "main", "recovered", "render"]

FILE: Final = RESULTS / "quantize_characters.json"
JUDGED, CALIBRATION = 256, 128
FORMATS: Final = ((4, 64), (4, 128), (3, 64), (2, 64))
METHODS: Final[Mapping[str, Mapping[str, Any]]] = {
    "rtn": {"method": "rtn", "search": "minmax"},
    "rtn, mse": {"method": "rtn", "search": "mse"},
    "hqq": {"method": "hqq"},
    "awq": {"method": "awq"},
    "gptq": {"method": "gptq"},
}
PEERS: Final = ("torchao", "hqq of PyPI", "nncf")


@dataclass(frozen=True)
class Row:
    """A method: bits per character of held-out text, stored bytes, CPU s for quantising."""

    bits: int
    group: int | None
    method: str
    loss: float
    bytes: int | None
    seconds: float

    @property
    def name(self) -> str:
        """What the table and `--only` call it."""
        return f"int{self.bits} g{self.group} {self.method}" if self.group else "float32"


class Bench:
    """The trained model, what it is judged on, and what calibrates it."""

    def __init__(self, text: Path, cache: Path) -> None:
        found = read_text(text)
        self.model, self.seconds = trained(found, cache)
        self.judged = found.windows(held_out=True, count=JUDGED)
        self.data = {"calibration": calibration(found, CALIBRATION)}
        example = self.data["calibration"][0]
        self.program = fxc.capture(self.model, kwargs=dict(example), dynamic="batch")

    def original(self) -> Row:
        """Return the figures of the model in float32."""
        loss, size = bits_per_character(self.model, self.judged), cost(self.program).bytes
        return Row(32, None, "", loss, size, round(self.seconds, 1))

    def run(self, bits: int, group: int, method: str) -> Row | None:
        """Return the figures of a method; None where its peer is not installed."""
        start = time.process_time()
        size = None
        if method in PEERS:
            build = partial(copy.deepcopy, self.model)
            found = _peers.quantise(method, build, bits, group, self.data["calibration"])
            if found is None:
                return None
            module = found
        else:
            program = self.quantise({"bits": bits, "group": group, **METHODS[method]})
            module, size = program.module, cost(program).bytes
        seconds = round(time.process_time() - start, 1)
        return Row(bits, group, method, bits_per_character(module, self.judged), size, seconds)

    def quantise(self, options: Mapping[str, Any]) -> Program:
        """Return what the pass makes of the model, without hashes and proofs."""
        entry = {
            "use": "quantize.weight_only",
            "exclude": ["lm_head"],
            "calibration": CALIBRATION,
            **options,
        }
        (parsed,) = parse_steps([entry])
        decision = parsed.pass_.decide(self.program, parsed.options, Context(data=self.data))
        rewriter = GraphRewriter(self.program)
        with torch.no_grad():
            parsed.pass_.rewrite(rewriter, decision)
        return rewriter.finish()


def candidates() -> Iterator[tuple[int, int, str]]:
    """Yield bits, group and method, the peers last."""
    yield from ((*each, method) for each in FORMATS for method in METHODS)
    for peer in PEERS:
        yield from ((*each, peer) for each in FORMATS if each[0] == 4 or peer != "nncf")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the methods that are missing and write the table."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.text is None and not options.render:
        parser.error("name the file of the text")
    torch.set_num_threads(1)
    rows = {row.name: row for row in read_rows(FILE, Row)}
    if not options.render:
        with TemporaryDirectory() as folder:
            bench = Bench(options.text, options.cache or Path(folder))
            _run(bench, rows, options.only or ["*"])
    (RESULTS / "quantize_characters.md").write_text(render(rows.values()), encoding="utf-8")
    return 0


def _run(bench: Bench, rows: dict[str, Row], only: Sequence[str]) -> None:
    if "float32" not in rows:
        _note(rows, bench.original())
    for bits, group, method in candidates():
        name = f"int{bits} g{group} {method}"
        if name not in rows and any(fnmatch.fnmatch(name, pattern) for pattern in only):
            row = bench.run(bits, group, method)
            if row is not None:
                _note(rows, row)


def _note(rows: dict[str, Row], row: Row) -> None:
    rows[row.name] = row
    write_rows(FILE, rows.values())
    print(f"{row.name}: {row.loss:.4f}, {row.bytes} bytes, {row.seconds} s", flush=True)


def recovered(row: Row, rows: Mapping[str, Row]) -> float | None:
    """Return the part of the loss of rounding to nearest that a row wins back."""
    original, nearest = rows.get("float32"), rows.get(f"int{row.bits} g{row.group} rtn")
    if original is None or nearest is None:
        return None
    return (nearest.loss - row.loss) / (nearest.loss - original.loss)


def render(rows: Iterable[Row]) -> str:
    """Return the page: the original, then by format from the best."""
    named = {row.name: row for row in rows}
    ordered = sorted(named.values(), key=lambda row: (-row.bits, row.group or 0, row.loss))
    original = named.get("float32")
    trained = "" if original is None else f" in {original.seconds:.0f} CPU s"
    lines = [
        "# A language model of characters with weights of few bits",
        "",
        f"`python -m benchmarks.quantize.characters TEXT` on {machine()}.",
        "",
        f"A causal transformer of 2.4 million parameters (3 layers of width 256), trained{trained}"
        f" on the King James Bible; bits per character on {JUDGED} windows of 256 characters from"
        f" pieces that were held out. Its 12 linear layers but the output are quantised,"
        f" calibrated on {CALIBRATION} windows of the training pieces. `rtn` covers the range of"
        " every group; `rtn, mse` clips it for the least squared error. Won back: the part of the"
        " loss of `rtn` in the same format. Seconds are CPU seconds of one thread for quantising.",
        "",
        "| weights | method | bits per character | against float | won back | MB | s |",
        "|:--|:--|--:|--:|--:|--:|--:|",
    ]
    for row in ordered:
        back = recovered(row, named)
        more = "" if original is None else f"{row.loss - original.loss:+.4f}"
        size = "–" if row.bytes is None else f"{row.bytes / 1e6:.2f}"
        label = f"int{row.bits} g{row.group}" if row.group else "float32"
        lines.append(
            f"| {label} | {row.method or '–'} | {row.loss:.4f} | {more} |"
            f" {'–' if back is None else f'{back:.0%}'} | {size} |"
            f" {f'{row.seconds:.0f}' if row.group else '–'} |"
        )
    return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantize.characters", description=__doc__
    )
    parser.add_argument(
        "text", nargs="?", type=Path, help="verses, one a line, after their references"
    )
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="keeps the trained model")
    parser.add_argument("--only", action="append", default=[], metavar="GLOB", help="names of rows")
    parser.add_argument("--render", action="store_true", help="only write the table again")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
