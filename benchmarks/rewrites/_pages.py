"""The two pages of the sweep: figures of every pass, and a table of passes and families."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from benchmarks._common import machine
from benchmarks.rewrites._rows import FAMILIES, ROWS

__all__ = ["families_page", "results_page"]

Table = Mapping[str, Mapping[str, Mapping[str, Any]]]
_MARKS: Final = {"equal": "=", "changed": "≈", "none": "·", "refused": "–", "wrong": "✗"}


def results_page(table: Table) -> str:
    """Return results/rewrites.md."""
    lines = [
        "# Structural passes over the zoo",
        "",
        f"`python -m benchmarks.rewrites.sweep` on {machine()}.",
        "",
        "Each pass on each model: captured, rewritten, and run on inputs with another batch size "
        "and padding. *Equal*: ‖a − b‖ ≤ 1e-6 · ‖a‖ for every output, and gradients of what "
        "was left as it was within 1e-4 of the largest; in brackets how many are so in single "
        "precision / with both sides computed in double precision, where the model's own rounding "
        "is larger / within four times the model's own rounding. The last column is the median "
        "and the largest ‖a − b‖ / ‖a‖. "
        "*Changed*: rewritten, and outputs are finite and others, as the pass says. *Nothing*: "
        "nothing in the model fits the pass. *Refused*: a clear error, most often that nothing "
        "fits. Not all models were run for all passes; how many were is in the second column.",
        "",
        "| pass | options | models | equal | changed | nothing | refused | wrong | failed | "
        "differences |",
        "|:--|:--|--:|--:|--:|--:|--:|--:|--:|:--|",
    ]
    for name, row in ROWS.items():
        cells = [cells[name] for cells in table.values() if name in cells]
        count = Counter(cell["status"] for cell in cells)
        errors = sorted(c.get("error", 0.0) for c in cells if c["status"] == "equal")
        shown = f"{errors[len(errors) // 2]:.1e}, {errors[-1]:.1e}" if errors else ""
        numbers = [count[s] for s in ("equal", "changed", "none", "refused", "wrong", "failed")]
        how = Counter(cell.get("precision") for cell in cells if cell["status"] == "equal")
        first, *others = numbers
        equal = f"{first} ({how['single']}/{how['double']}/{how['rounding']})" if first else "0"
        middle = " | ".join(map(str, (len(cells), equal, *others)))
        lines.append(f"| `{name}` | {row.what or 'the default'} | {middle} | {shown} |")
    bad = [
        f"- {model}, `{name}`: {cell['status']}: {cell.get('text', '')}"
        + (f" ({cell['error']:.1e})" if "error" in cell else "")
        for model, cells in sorted(table.items())
        for name, cell in cells.items()
        if cell["status"] in ("wrong", "failed")
    ]
    return "\n".join([*lines, "", "## Wrong and failed", "", *(bad or ["None."])]) + "\n"


def families_page(table: Table) -> str:
    """Return docs/rewrites.md."""
    lines = [
        "# Rewrites and architectures",
        "",
        "Every cell was run: a small model of the family was captured, went through the pass, and "
        "was run on inputs with another batch size and padding.",
        "",
        "= outputs are what they were (‖a − b‖ ≤ 1e-6 · ‖a‖, or in double precision where the "
        "model's own rounding is larger), and gradients too; "
        "≈ rewritten, outputs are others, as the pass says; · nothing in it fits the pass; "
        "– the pass refuses with a clear error; ✗ a fault. "
        "`make rewrites` runs it again; a test of `make slow` holds every cell to what it says. "
        "The same over all models of the zoo is in "
        "[benchmarks/results/rewrites.md](../benchmarks/results/rewrites.md).",
        "",
        "| pass | options | " + " | ".join(FAMILIES) + " |",
        "|:--|:--|" + ":-:|" * len(FAMILIES),
    ]
    for name, row in ROWS.items():
        cells = [table.get(model, {}).get(name) for model in FAMILIES.values()]
        marks = [_MARKS.get(cell["status"], "✗") if cell else "" for cell in cells]
        lines.append(f"| `{name}` | {row.what or 'the default'} | " + " | ".join(marks) + " |")
    reasons = [
        f"- `{name}`, {family}: {_short(cell.get('text', ''))}"
        for name in ROWS
        for family, model in FAMILIES.items()
        if (cell := table.get(model, {}).get(name)) and cell["status"] in ("refused", "wrong")
    ]
    return (
        "\n".join([*lines, "", "## What is refused, and why", "", *(reasons or ["None."])]) + "\n"
    )


def _short(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= 240 else text[:237] + "…"
