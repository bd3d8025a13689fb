"""`fxcompress explain`: one node, parameter or axis, and what each pass does to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from fxcompress.cli._command import Outcome, document_options, emits, existing, overrides
from fxcompress.errors import UsageError

if TYPE_CHECKING:
    from torch.fx import Node

    from fxcompress.ir import Program
    from fxcompress.pipeline.plans import Change
    from fxcompress.rewrite.edits import Declined

__all__ = ["command"]


@click.command("explain")
@existing("spec", metavar="SPEC|RUN")
@click.argument("node")
@click.argument("other", required=False)
@overrides
@document_options
@emits
def command(spec: Path, node: str, other: str | None, overrides: Sequence[str]) -> Outcome:
    """Say what a node of the model is, what must shrink with it, and what each pass does to it.

    NODE is an id as plans and reports show them (`layer1.0.conv1`, `layer1.0/relu`), a parameter
    (`fc.weight`), one dimension of either (`fc.weight[1]`), or an axis as prune.channels names it.
    With OTHER it says whether the two shrink together, and why. For a run folder it tells what was
    done; for a spec, what would be done.
    """
    from fxcompress.cli._axes_text import axes_text, coupling_text
    from fxcompress.cli._specs import is_run

    programs, history = _done(spec, node) if is_run(spec) else _planned(spec, overrides, node)
    found, program = _find(programs, node, history)
    document: dict[str, Any] = {"node": node, **found, "passes": history}
    parts = [_text(node, found)]
    if program is not None:
        from fxcompress.axes import analyze, coupling, explain

        analysis = analyze(program)
        explanation = explain(analysis, node)
        document["axes"] = asdict(explanation)
        parts.append(axes_text(explanation, analysis.unknown))
        if other is not None:
            pair = coupling(analysis, node, other)
            document["coupling"] = asdict(pair)
            parts.append(coupling_text(pair))
    elif other is not None:
        raise UsageError(f"`{node}` is only in the passes, so it has no axes", where=node)
    parts.append(_history_text(history))
    return Outcome("\n".join(part for part in parts if part), document)


def _done(run: Path, node: str) -> tuple[list[Program], list[dict[str, Any]]]:
    """Return a run's Programs and what each pass did."""
    from fxcompress.cli._specs import load_programs
    from fxcompress.ir import node_ids
    from fxcompress.pipeline._changes import changes

    record, original, result = load_programs(run)
    order = dict.fromkeys(name for p in (original, result) for name in node_ids(p).values())
    history = [
        _step(each.index, each.id, changes(each.edits, order), each.declined, node)
        for each in record.passes
    ]
    return [original, result], history


def _planned(
    path: Path, overrides: Sequence[str], node: str
) -> tuple[list[Program], list[dict[str, Any]]]:
    """Return a spec's Program and what each pass would do."""
    from fxcompress.cli._progress import working
    from fxcompress.spec import Spec

    spec = Spec.load(path, overrides)
    from fxcompress.api import prepare

    with working("planning"):
        job = prepare(spec)
        plan = job.plan()
    history = [_step(each.index, each.id, each.changes, each.declined, node) for each in plan.steps]
    return [job.program], history


def _step(
    index: int, step_id: str, changes: Sequence[Change], declined: Sequence[Declined], node: str
) -> dict[str, Any]:
    """Return what one pass does to a node: the changes and refusals that name it."""
    named = _names(node)
    return {
        "index": index,
        "id": step_id,
        "changes": [each.model_dump(mode="json") for each in changes if each.subject in named],
        "declined": [
            each.model_dump(mode="json")
            for each in declined
            if named.intersection((each.node, each.node.partition("[")[0], *each.because_of))
        ],
    }


def _names(node: str) -> set[str]:
    """Return what passes may call what was asked for: itself, its parameters, its module."""
    tensor, dim, _ = node.partition("[")
    module, _, last = tensor.rpartition(".")
    names = {node, tensor, *(f"{tensor}.{name}" for name in ("weight", "bias"))}
    return names | {module} if module and (dim or last in ("weight", "bias")) else names


def _find(
    programs: Sequence[Program], name: str, history: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], Program | None]:
    """Describe what a name stands for in the first Program that has it.

    Raises:
        UsageError: No Program has it and no pass speaks of it.
    """
    from fxcompress.axes import analyze, explain
    from fxcompress.ir import node_ids

    for program in programs:
        ids = node_ids(program)
        for node, node_id in ids.items():
            if node_id == name:
                return _described(program, node, ids), program
    failures: list[UsageError] = []
    for program in programs:
        try:
            explain(analyze(program), name)
            return {}, program
        except UsageError as error:
            failures.append(error)
    if any(step["changes"] or step["declined"] for step in history):
        return {}, None
    raise failures[0]


def _described(program: Program, node: Node, ids: Mapping[Node, str]) -> dict[str, Any]:
    from fxcompress.analysis import cost
    from fxcompress.ir import attributes, op_name, type_text

    costs = {row.id: row for row in cost(program).per_node}
    row = costs.get(ids[node])
    value = node.meta.get("val")
    return {
        "op": op_name(node),
        "attributes": {key: str(each) for key, each in attributes(node).items()},
        "type": "" if value is None else type_text(value, program),
        "scope": [f"{path or '.'}: {kind}" for path, kind in node.meta.get("scope") or ()],
        "source": node.meta.get("source"),
        "inputs": [ids[each] for each in node.all_input_nodes],
        "users": [ids[each] for each in node.users],
        "parameters": row.parameters if row else 0,
        "bytes": row.bytes if row else 0,
        "macs": row.macs if row else 0,
    }


def _text(name: str, found: Mapping[str, Any]) -> str:
    lines = [name]
    if found:
        attributes = " ".join(f"{key}={value}" for key, value in found["attributes"].items())
        shown = f" {{{attributes}}}" if attributes else ""
        lines.append(f"  {found['op']}{shown} : {found['type']}")
        lines.append(f"  from {', '.join(found['inputs']) or 'nothing'}")
        lines.append(f"  used by {', '.join(found['users']) or 'nothing'}")
        lines.append(
            f"  {found['parameters']:,} parameters, {found['bytes']:,} bytes, "
            f"{found['macs']:,} MACs"
        )
        if found["source"]:
            lines.append(f"  written in {found['source']}")
        lines.extend(f"  in {scope}" for scope in found["scope"])
    return "\n".join(lines)


def _history_text(history: Sequence[Mapping[str, Any]]) -> str:
    lines: list[str] = []
    for step in history:
        lines.append(f"{step['index']} {step['id']}")
        for each in step["changes"]:
            lines.append(f"  {each['sign']} {each['subject']}  {each['text']}".rstrip())
        lines.extend(f"  ! skipped: {entry['reason']}" for entry in step["declined"])
        if not step["changes"] and not step["declined"]:
            lines.append("  leaves it as it is")
    return "\n".join(lines)
