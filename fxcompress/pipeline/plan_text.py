"""A plan as text: what each pass would change, then the figures side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from fxcompress.analysis import CostSummary
    from fxcompress.pipeline.plans import Change, Plan, PlanStep

__all__ = ["render_plan"]

SHOWN = 3
"""Changes and refusals shown per pass unless `verbose`."""

WIDTH = 110
"""Longer lines are cut unless `verbose`."""

_STYLES = {"+": "green", "-": "red", "~": "yellow", "!": "magenta", "?": "cyan"}
_Row = tuple[str, list[str], str]


def render_plan(plan: Plan, *, verbose: bool = False) -> Text:
    """Return the plan as styled text; `.plain` is the text alone.

    Args:
        plan: The plan.
        verbose: Show every change instead of the first few of each pass.
    """
    text = Text()
    nodes = plan.original.nodes
    text.append(f"fxcompress plan {plan.source or plan.name}", style="bold")
    text.append(f"   model {plan.name}  #{plan.basis.model[:8]}   {nodes} nodes\n")
    for step in plan.steps:
        text.append("\n")
        _append_step(text, step, verbose=verbose)
    text.append("\n")
    _append_table(text, plan)
    _append_summary(text, plan)
    return text


def _append_step(text: Text, step: PlanStep, *, verbose: bool) -> None:
    counts = [
        f"{count} {what}"
        for sign, what in (("+", "added"), ("~", "changed"), ("-", "removed"))
        if (count := step.count(sign))
    ]
    text.append(f"{step.index} {step.id:<20}", style="bold")
    name = "" if step.use == step.id else f"{step.use}   "
    text.append(f"{name}{step.where}{'   ' if step.where else ''}{', '.join(counts)}\n")
    for line in step.summary:
        text.append(f"  {line}\n" if verbose or len(line) <= WIDTH else f"  {line[: WIDTH - 1]}…\n")
    changes = [change for change in step.changes if verbose or not change.follows]
    _append_lines(text, [_change(change) for change in changes], verbose)
    following = 0 if verbose else sum(change.follows for change in step.changes)
    if following:
        text.append(f"  … {following} nodes follow with other types (-v)\n", style="dim")
    skipped = [("!", f"skipped {each.node}", each.reason) for each in step.declined]
    _append_lines(text, skipped, verbose)
    _append_lines(text, [("?", each, "") for each in step.pending], verbose)


def _change(change: Change) -> tuple[str, str, str]:
    return change.sign, change.subject, change.text


def _append_lines(text: Text, lines: Sequence[tuple[str, str, str]], verbose: bool) -> None:
    shown = lines if verbose or len(lines) <= SHOWN + 1 else lines[:SHOWN]
    for sign, subject, rest in shown:
        text.append(f"  {sign} ", style=_STYLES[sign])
        line = f"{subject:<20}  {rest}".rstrip()
        long = not verbose and len(line) > WIDTH
        text.append(f"{line[: WIDTH - 1]}…\n" if long else f"{line}\n")
    if len(shown) < len(lines):
        text.append(f"  … {len(lines) - len(shown)} more (-v)\n", style="dim")


def _append_table(text: Text, plan: Plan) -> None:
    columns = _columns(plan)
    costs = [plan.original, *(step.cost for step in columns)]
    heads = ["now", *(step.series or step.id for step in columns), "change"]
    rows = [
        _row("nodes", [cost.nodes for cost in costs], 1, "", relative=False),
        _figure("params", costs, lambda cost: cost.parameters, 1000),
        _figure("MACs", costs, lambda cost: cost.macs, 1000),
        _figure("weights", costs, lambda cost: cost.bytes, 1024),
        *_limits(columns),
    ]
    first = max(len(row[0]) for row in rows)
    widths = [
        max(len(head), *(len(cells[place]) for _, cells, _ in rows))
        for place, head in enumerate(heads)
    ]
    head = "  ".join(each.rjust(width) for each, width in zip(heads, widths, strict=True))
    text.append(f"{'':<{first}}  {head}\n", style="bold")
    text.append("─" * (first + 2 + len(head)) + "\n")
    for name, cells, style in rows:
        line = "  ".join(each.rjust(width) for each, width in zip(cells, widths, strict=True))
        text.append(f"{name:<{first}}  {line.rstrip()}\n", style=style)


def _figure(
    name: str, costs: Sequence[CostSummary], pick: Callable[[CostSummary], int], base: int
) -> _Row:
    """Return a row in the largest unit in which the original's figure is at least 1."""
    values = [pick(cost) for cost in costs]
    units = ("", "k", "M", "G", "T") if base == 1000 else ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while power + 1 < len(units) and values[0] >= base ** (power + 1):
        power += 1
    return _row(name, values, base**power, units[power])


def _row(
    name: str, values: Sequence[int], divisor: int, unit: str, *, relative: bool = True
) -> _Row:
    cells = [str(value) if divisor == 1 else f"{value / divisor:.4g}" for value in values]
    first, last = values[0], values[-1]
    if first == last:
        change = "="
    elif relative and first:
        change = f"{(last - first) / first:+.1%}".replace("-", "−")
    else:
        change = f"{last - first:+}".replace("-", "−")
    return f"{name} ({unit})" if unit else name, [*cells, change], ""


def _columns(plan: Plan) -> list[PlanStep]:
    """Return the steps that have a column: of rounds only the last one."""
    last = {step.series: step for step in plan.steps if step.series}
    return [step for step in plan.steps if not step.series or last[step.series] is step]


def _limits(columns: Sequence[PlanStep]) -> list[_Row]:
    rows: list[_Row] = []
    names = dict.fromkeys((limit.name, limit.limit) for s in columns for limit in s.limits)
    for name, bound in names:
        cells = [""]
        for step in columns:
            met = next((each.met for each in step.limits if each.name == name), None)
            cells.append({True: "✓", False: "✗", None: "?"}[met])
        style = {"✓": "green", "✗": "red"}.get(cells[-1], "")
        rows.append((f"{name} {bound}", [*cells, ""], style))
    return rows


def _append_summary(text: Text, plan: Plan) -> None:
    counts = {sign: sum(step.count(sign) for step in plan.steps) for sign in "+~-"}
    skipped = sum(len(step.declined) for step in plan.steps)
    text.append(
        f"\nPlan: {counts['+']} to add, {counts['~']} to change, {counts['-']} to remove, "
        f"{skipped} skipped. Nothing was run.\n"
    )
