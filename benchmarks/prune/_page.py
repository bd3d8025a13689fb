"""The coverage table as a Markdown page: a summary per group, then a row per model."""

from __future__ import annotations

import platform
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata

from benchmarks.zoo import ZooModel

from ._groups import GROUPS, group
from ._judge import TOLERANCE
from ._results import Outcome, Side

__all__ = ["LIMITS", "render"]

LIMITS: dict[Side, int] = {"ours": 200, "peer": 20}
"""CPU seconds per model; ours are for capture, the proof and its control too."""

Outcomes = Mapping[tuple[str, Side], Outcome]
_PACKAGES = ("torch", "torchvision", "timm", "transformers", "torch-pruning")
_MARKS = {
    "right": "✓",
    "wrong": "✗ wrong",
    "crash": "✗ crash",
    "no-op": "✗ no-op",
    "timeout": "✗ timeout",
    "unjudged": "?",
    "not captured": "– not captured",
}
_GROUP_HEADER = (
    "group",
    "models",
    "ours right",
    "Torch-Pruning right",
    "ours reached, median",
    "Torch-Pruning reached, median",
    "ours coverage, least",
    "ours s, median",
    "Torch-Pruning s, median",
)
_MODEL_HEADER = (
    "model",
    *(
        "ours",
        "error, σ",
        "control",
        "reached",
        "coverage",
        "parameters left",
        "s",
        "emit → reload",
    ),
    *("Torch-Pruning", "error, σ", "reached", "parameters left", "s"),
)


def render(models: Sequence[ZooModel], outcomes: Outcomes, *, command: str, ratio: float) -> str:
    """Render the page of what has an outcome; `command` is what made it."""
    shown = [m for m in models if (m.id, "ours") in outcomes or (m.id, "peer") in outcomes]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in _PACKAGES)
    lines = [
        "# Structured pruning: coverage",
        "",
        f"Made by `{command}`: {versions}, Python {platform.python_version()}. Every model of the"
        f" zoo that is listed, pruned at ratio {ratio:g} by both sides, each in its own process.",
        "",
        "*right*: the pruned model's output on a batch that pruning has not seen equals, within"
        f" {TOLERANCE:g} of the output's standard deviation and in double precision where the model"
        " runs in it, the original whose removed entries are zero and whose norm statistics are"
        " over the kept channels. *reached*: share of all parameters in tensors with a pruned"
        " dimension. *coverage*: the same of the prunable ones (all but input, output and frozen"
        " with a reason). *control*: with one wrong channel in the reference, the comparison"
        " fails. Torch-Pruning runs by its documented recipes (`benchmarks/prune/_peer.py` names"
        f" them) and is ended after {LIMITS['peer']} CPU seconds. Seconds are CPU seconds too:"
        " building its graph and pruning for Torch-Pruning;"
        " analysis, choice and rewriting for ours, capture aside.",
        "",
        *_summary(shown, outcomes),
        "",
        *_reasons(shown, outcomes),
        *_rows(shown, outcomes),
    ]
    return "\n".join(lines) + "\n"


def _summary(models: Sequence[ZooModel], outcomes: Outcomes) -> list[str]:
    lines = [_row(_GROUP_HEADER), _row(_rule(_GROUP_HEADER))]
    for name in (*GROUPS, "all"):
        members = [m for m in models if name in ("all", group(m))]
        if members:
            lines.append(_summary_row(name, members, outcomes))
    return lines


def _summary_row(name: str, members: Sequence[ZooModel], outcomes: Outcomes) -> str:
    ours = [o for m in members if (o := outcomes.get((m.id, "ours")))]
    peer = [o for m in members if (o := outcomes.get((m.id, "peer")))]
    coverage = [o.coverage for o in ours if o.status == "right" and o.coverage is not None]
    return _row(
        [
            name,
            str(len(members)),
            _right(ours),
            _right(peer),
            _median([o.reached for o in ours if o.status == "right"], "{:.0%}"),
            _median([o.reached for o in peer if o.status == "right"], "{:.0%}"),
            f"{min(coverage):.0%}" if coverage else "–",
            _median([o.seconds for o in ours if o.seconds is not None], "{:.2f}"),
            _median([o.seconds for o in peer if o.seconds is not None], "{:.2f}"),
        ]
    )


def _right(outcomes: Sequence[Outcome]) -> str:
    right = sum(outcome.status == "right" for outcome in outcomes)
    return f"{right} of {len(outcomes)} ({right / len(outcomes):.0%})" if outcomes else "–"


def _median(values: Sequence[float], form: str) -> str:
    return form.format(statistics.median(values)) if values else "–"


def _reasons(models: Sequence[ZooModel], outcomes: Outcomes) -> list[str]:
    lines = []
    sides: tuple[tuple[Side, str], ...] = (("ours", "Ours"), ("peer", "Torch-Pruning"))
    for side, title in sides:
        bad = [o for m in models if (o := outcomes.get((m.id, side))) and o.status != "right"]
        counts = Counter(outcome.status for outcome in bad)
        told = ", ".join(f"{count} {status}" for status, count in counts.most_common()) or "none"
        lines += [f"## {title}: what is not right ({told})", ""]
        for outcome in bad:
            detail = outcome.detail.replace("|", "\\|").replace("<", "&lt;")[:220]
            lines.append(f"- `{outcome.model}`: {outcome.status}: {detail}")
        lines.append("")
    unknown: Counter[str] = Counter()
    for model in models:
        if outcome := outcomes.get((model.id, "ours")):
            unknown.update(outcome.unknown)
    if unknown:
        named = ", ".join(f"`{name}` {count}" for name, count in unknown.most_common())
        lines += [f"Operations without a rule (calls): {named}.", ""]
    return lines


def _rows(models: Sequence[ZooModel], outcomes: Outcomes) -> list[str]:
    lines = ["## Models", "", _row(_MODEL_HEADER), _row(_rule(_MODEL_HEADER))]
    for model in models:
        ours = outcomes.get((model.id, "ours"))
        peer = outcomes.get((model.id, "peer"))
        lines.append(_row([model.id, *_ours(ours), *_peer(peer)]))
    return lines


def _ours(outcome: Outcome | None) -> list[str]:
    if outcome is None:
        return ["–"] * 8
    control = {None: "–", True: "caught", False: "missed"}[outcome.control]
    coverage = "–" if outcome.coverage is None else f"{outcome.coverage:.0%}"
    return [
        *(_MARKS[outcome.status], _error(outcome), control),
        *(f"{outcome.reached:.0%}", coverage, _left(outcome)),
        *(_seconds(outcome), outcome.emitted or "–"),
    ]


def _peer(outcome: Outcome | None) -> list[str]:
    if outcome is None:
        return ["–"] * 5
    mark, reached = _MARKS[outcome.status], f"{outcome.reached:.0%}"
    return [mark, _error(outcome), reached, _left(outcome), _seconds(outcome)]


def _error(outcome: Outcome) -> str:
    return "–" if outcome.error is None else f"{outcome.error:.0e}"


def _left(outcome: Outcome) -> str:
    if not outcome.parameters_after or not outcome.parameters_before:
        return "–"
    return f"{outcome.parameters_after / outcome.parameters_before:.0%}"


def _seconds(outcome: Outcome) -> str:
    return "–" if outcome.seconds is None else f"{outcome.seconds:.2f}"


def _rule(header: Sequence[str]) -> list[str]:
    return [":--", *["--:"] * (len(header) - 1)]


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
