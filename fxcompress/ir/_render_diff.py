"""A diff as plain text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from fxcompress.ir._changes import (
    OUTPUT_TOLERANCE,
    STATE_TOLERANCE,
    GraphDiff,
    Group,
    NodeChange,
    OutputChange,
    StateChange,
)

__all__ = ["render_diff"]

_BAR: Final = 12


def render_diff(changes: GraphDiff, names: tuple[str, str] = ("before", "after")) -> str:
    """Return the differences as plain text: a summary per module, then the lines.

    Args:
        changes: What `diff` returned.
        names: What the two sides are called.
    """
    lines = [f"{changes.verdict.value}: {names[0]} → {names[1]}"]
    if not changes:
        return lines[0] + "\n"
    groups = changes.groups()
    lines += ["", *_summary(groups)]
    for group in groups:
        if group.changes:
            lines += ["", f"@@ {group.path or '(root)'} @@"]
            lines += [line for change in group.changes for line in _change_lines(change)]
    if changes.returns:
        lines += ["", "@@ return @@", f"- {changes.before.returns}", f"+ {changes.after.returns}"]
    for output in changes.outputs:
        lines += ["", _output_title(output)]
        lines += [f"{sign} {side}" for sign, side in (("-", output.before), ("+", output.after))
                  if side is not None]  # fmt: skip
    lines += ["", _totals(changes)]
    return "\n".join(lines) + "\n"


def _summary(groups: tuple[Group, ...]) -> Iterator[str]:
    same = sum(group.nodes for group in groups if not group.changes)
    width = max(len(group.path or "(root)") for group in groups)
    for group in groups:
        if not group.changes:
            continue
        added, removed = group.count("add"), group.count("remove")
        changed = group.count("change", "move")
        tensors = len(group.changes) - added - removed - changed
        counts = [f"{sign}{n}" for sign, n in (("+", added), ("~", changed), ("-", removed)) if n]
        if tensors:
            counts.append(f"{tensors} tensor{'s' if tensors > 1 else ''}")
        total = max(1, added + changed + removed)
        scale = min(1.0, _BAR / total)
        bar = "".join(c * max(1, round(n * scale)) if n else ""
                      for c, n in (("+", added), ("~", changed), ("-", removed)))  # fmt: skip
        yield f" {group.path or '(root)':<{width}}  {' '.join(counts):<16} {bar}".rstrip()
    if same:
        yield f" {same} nodes identical in other modules"


def _change_lines(change: NodeChange | StateChange) -> list[str]:
    if isinstance(change, NodeChange):
        if change.kind == "move":
            return [f"~ {change.after}  (moved)"]
        pairs = (("-", change.before), ("+", change.after))
        return [f"{sign} {line}" for sign, line in pairs if line is not None]
    pairs_ = (("-", change.before), ("+", change.after))
    lines = [f"{sign} {line}" for sign, line in pairs_ if line is not None]
    if change.kind == "numbers":
        lines.append(f"  Δ {change.distance:.2%} of absmax; tolerance {STATE_TOLERANCE:.3%}")
    return lines


def _output_title(output: OutputChange) -> str:
    if output.kind != "numbers":
        return f"@@ output {output.index} @@"
    return (
        f"@@ output {output.index} @@  figures differ by {output.distance:.2%} of absmax; "
        f"tolerance {OUTPUT_TOLERANCE:.1%}"
    )


def _totals(changes: GraphDiff) -> str:
    def count(*kinds: str) -> int:
        return sum(change.kind in kinds for change in changes.nodes)

    parts = [
        f"{count('change', 'move')} nodes changed, {count('add')} added, {count('remove')} removed"
    ]
    for name, _ in changes.after.totals:
        was, now = changes.before.total(name), changes.after.total(name)
        if was != now:
            percent = f" ({(now - was) / was:+.0%})" if was else ""
            parts.append(f"{name} {was:,} → {now:,}{percent}".replace(",", " "))
    return "; ".join(parts)
