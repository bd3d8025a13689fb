"""The sweep's result as a Markdown page: totals, a row per model, every failure with its reason."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Iterable, Sequence
from importlib import metadata

from ._results import CHECKS, Check, Result

__all__ = ["render"]

_MARKS = {"pass": "✓", "fail": "✗", "skip": "–"}


def render(results: Sequence[Result], *, command: str) -> str:
    """Render the page; `command` is what made it."""
    lines = [
        "# Model zoo",
        "",
        f"Made by `{command}`: {_environment()}. (`--failed` keeps what passed in earlier sweeps.)",
        "Each model runs in its own process. *equal*: outputs equal eager to 1e-5 of their range on"
        " a second random input with another batch size (text: length and padding too)."
        " *keys*: the state dict keys are the original's, but those listed as unused. *train*: with"
        " one seed, outputs, gradients and buffers after a training step equal eager's (≈: in"
        " double precision, where single precision amplifies rounding). *verify*:"
        " `fxcompress.ir.verify`. *macs*: within 0.1 % of `torch.utils.flop_counter`."
        " Seconds are CPU seconds of `capture` in both modes with its own verification.",
        "",
        *_totals(results),
        "",
        *_failures(results),
        *_rows(results),
    ]
    return "\n".join(lines) + "\n"


def _environment() -> str:
    packages = ("torch", "torchvision", "timm", "transformers")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    return f"{versions}, Python {platform.python_version()}"


def _totals(results: Sequence[Result]) -> list[str]:
    header = ["source", "models", "families", *CHECKS, "all", "capture s, median (max)"]
    lines = [_row(header), _row("---" for _ in header)]
    sources = list(dict.fromkeys(_source(result) for result in results))
    for source in [*sources, "total"]:
        chosen = [r for r in results if source in ("total", _source(r))]
        seconds = [r.capture_seconds for r in chosen if r.capture_seconds is not None]
        passed = sum(result.passed for result in chosen)
        times = f"{statistics.median(seconds):.2f} ({max(seconds):.2f})" if seconds else "–"
        families = {(_source(r), r.family) for r in chosen}
        lines.append(
            _row(
                [
                    source,
                    str(len(chosen)),
                    str(len(families)),
                    *(_share(chosen, check) for check in CHECKS),
                    f"{passed} ({passed / len(chosen):.1%})",
                    times,
                ]
            )
        )
    return lines


def _share(results: Sequence[Result], check: str) -> str:
    passed = sum(result.checks[check].status == "pass" for result in results)
    return f"{passed} ({passed / len(results):.1%})"


def _failures(results: Sequence[Result]) -> list[str]:
    lines = ["## Failures", ""]
    for result in results:
        for name, check in result.checks.items():
            if check.status == "fail":
                reason = check.detail.replace("|", "\\|").replace("<", "&lt;")
                lines.append(f"- `{result.id}`, {name}: {reason}")
    if len(lines) == 2:
        lines.append("None.")
    return [*lines, ""]


def _rows(results: Sequence[Result]) -> list[str]:
    header = ["model", "family", *CHECKS, "error", "nodes", "parameters", "MACs", "capture s"]
    lines = ["## Models", "", _row(header), _row("---" for _ in header)]
    for result in results:
        error = result.checks["equal"].value
        lines.append(
            _row(
                [
                    result.id,
                    result.family,
                    *(_mark(result.checks[name]) for name in CHECKS),
                    "–" if error is None else f"{error:.0e}",
                    _count(result.nodes),
                    _count(result.parameters),
                    _count(result.macs),
                    "–" if result.capture_seconds is None else f"{result.capture_seconds:.2f}",
                ]
            )
        )
    return lines


def _mark(check: Check) -> str:
    """A check that passed with a reservation (in double precision only) is marked as such."""
    return "≈" if check.status == "pass" and check.detail else _MARKS[check.status]


def _source(result: Result) -> str:
    return result.id.split("/", 1)[0]


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
