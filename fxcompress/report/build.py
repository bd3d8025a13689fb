"""From a run's record and its two Programs to the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch

from fxcompress.analysis import Cost, CostSummary, cost
from fxcompress.ir import Program, op_name
from fxcompress.pipeline.figures import Curve, Heatmap, Ladder
from fxcompress.pipeline.records import PassRecord, RunRecord
from fxcompress.report._format import binary, exponent, metric, si, signed_percent
from fxcompress.report._training import trainings
from fxcompress.report.axes import shrunk_axes
from fxcompress.report.graph import union_graph
from fxcompress.report.model import (
    ArtifactRow,
    Bar,
    Card,
    Chart,
    ConstraintRow,
    DeclinedRow,
    Grade,
    Histogram,
    LatencyRow,
    PassFigures,
    PassRow,
    Provenance,
    Report,
    SensitivityRow,
    Totals,
)

__all__ = ["Extras", "build"]

_BARS = 24
_HISTOGRAMS = 8
_BINS = 48


@dataclass(frozen=True)
class Extras:
    """What a report says beside the run's record; everything may be left out.

    `metrics` holds the metric after each pass by its index, 0 being the original. `date` is given,
    not read from a clock, so that the same run renders to the same bytes.
    """

    spec_name: str = ""
    spec_text: str = ""
    lock: str = ""
    date: str = ""
    metric_name: str = ""
    metrics: Mapping[int, float] = field(default_factory=dict)
    higher_is_better: bool = True
    constraints: Sequence[ConstraintRow] = ()
    artifacts: Sequence[ArtifactRow] = ()
    latency: Sequence[LatencyRow] = ()
    sensitivity: Sequence[SensitivityRow] = ()


def build(
    record: RunRecord, before: Program, after: Program, extras: Extras | None = None
) -> Report:
    """Return the report of a run.

    Args:
        record: What the pipeline recorded.
        before: The original Program.
        after: The result.
        extras: Spec, metric, constraints, artefacts and latency, where there are any.
    """
    extras = extras or Extras()
    costs = cost(before), cost(after)
    steps = " → ".join(step.id for step in record.passes)
    return Report(
        title=f"{record.name} · {steps}" if steps else record.name,
        provenance=Provenance(
            model=before.name,
            model_hash=record.model,
            spec=extras.spec_name or "composed in Python",
            spec_hash=record.spec,
            result_hash=after.fingerprint().digest,
            date=extras.date,
            versions=record.versions.model_dump(),
            seed=record.seed,
        ),
        cards=_cards(record, extras),
        constraints=tuple(extras.constraints),
        metric_name=extras.metric_name,
        passes=(_original(record, extras), *(_row(p, extras) for p in record.passes)),
        trainings=trainings(record.passes),
        figures=tuple(
            PassFigures(
                id=each.id,
                heatmaps=tuple(f for f in each.figures if isinstance(f, Heatmap)),
                ladders=tuple(f for f in each.figures if isinstance(f, Ladder)),
                curves=tuple(f for f in each.figures if isinstance(f, Curve)),
            )
            for each in record.passes
            if each.figures
        ),
        axes=shrunk_axes(record, before),
        graph=union_graph(before, after),
        charts=tuple(
            _bars(title, unit, key, *costs)
            for title, unit, key in (
                ("Weights", "bytes", "bytes"),
                ("Work", "MACs", "macs"),
            )
        ),
        histograms=_histograms(before, after),
        sensitivity=tuple(extras.sensitivity),
        latency=tuple(extras.latency),
        artifacts=tuple(extras.artifacts),
        notes=tuple(f"{note.about}: {note.text}" for note in after.notes),
        spec_text=extras.spec_text,
        lock=extras.lock,
    )


def _totals(summary: CostSummary) -> Totals:
    return Totals(
        nodes=summary.nodes,
        parameters=summary.parameters,
        macs=summary.macs,
        bytes=summary.bytes,
        activation_peak=summary.activation_peak,
    )


def _original(record: RunRecord, extras: Extras) -> PassRow:
    return PassRow(
        index=0,
        id="original",
        use="",
        totals=_totals(record.original),
        metric=extras.metrics.get(0),
    )


def _row(record: PassRecord, extras: Extras) -> PassRow:
    outputs = record.to_original
    return PassRow(
        index=record.index,
        id=record.id,
        use=record.use,
        totals=_totals(record.after),
        error=outputs.relative if outputs else None,
        cosine=outputs.cosine if outputs else None,
        sqnr_db=outputs.sqnr_db if outputs else None,
        metric=extras.metrics.get(record.index),
        seconds=record.seconds,
        proof=record.proof.grade,
        edits=record.counts,
        declined=tuple(DeclinedRow(node=d.node, reason=d.reason) for d in record.declined),
        pending=record.pending,
        notes=(*record.summary, *record.proof.checks),
    )


def _cards(record: RunRecord, extras: Extras) -> tuple[Card, ...]:
    old, new = record.original, record.result
    cards = [
        _change("weights", binary(new.bytes), binary(old.bytes), old.bytes, new.bytes),
        _change("MACs", si(new.macs), si(old.macs), old.macs, new.macs),
    ]
    if extras.metrics:
        last = max(extras.metrics)
        cards.append(_metric_card(extras.metrics.get(0), extras.metrics[last], extras))
    outputs = record.passes[-1].to_original if record.passes else None
    if outputs is not None:
        detail = f"max|Δ| / range, cosine {outputs.cosine:.4f}"
        grade: Grade = "good" if outputs.relative <= 1e-4 else "warn"
        cards.append(
            Card(label="output error", value=exponent(outputs.relative), detail=detail, grade=grade)
        )
    if extras.constraints:
        met = sum(row.met for row in extras.constraints)
        total = len(extras.constraints)
        names = ", ".join(f"{row.name} {row.limit}" for row in extras.constraints)
        cards.append(
            Card(
                label="constraints",
                value=f"{met} / {total} {'✓' if met == total else '✗'}",
                detail=names,
                grade="good" if met == total else "bad",
            )
        )
    return tuple(cards)


def _change(label: str, value: str, was: str, old: float, new: float) -> Card:
    change = signed_percent(old, new)
    detail = change if old == new else f"was {was} ({change})"
    return Card(label=label, value=value, detail=detail, grade="good" if new < old else "plain")


def _metric_card(old: float | None, new: float, extras: Extras) -> Card:
    if old is None:
        return Card(label=extras.metric_name or "metric", value=metric(new))
    gain = new - old if extras.higher_is_better else old - new
    return Card(
        label=extras.metric_name or "metric",
        value=metric(new),
        detail=f"was {metric(old)} ({new - old:+.3g})".replace("-", "−"),
        grade="good" if gain >= -0.01 * abs(old) else "warn",
    )


def _bars(title: str, unit: str, key: str, before: Cost, after: Cost) -> Chart:
    """Return the largest layers of one quantity, in graph order."""
    old, new = _per_layer(before, key), _per_layer(after, key)
    names = [name for name in {**old, **new} if old.get(name) or new.get(name)]
    size = {name: max(old.get(name, 0), new.get(name, 0)) for name in names}
    shown = set(sorted(names, key=lambda name: -size[name])[:_BARS])
    return Chart(
        title=title,
        unit=unit,
        bars=tuple(
            Bar(label=name, before=old.get(name), after=new.get(name))
            for name in names
            if name in shown
        ),
        omitted=len(names) - len(shown),
    )


def _per_layer(costs: Cost, key: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for node in costs.per_node:
        name = node.scope or node.id
        found[name] = found.get(name, 0) + getattr(node, key)
    return found


def _histograms(before: Program, after: Program) -> tuple[Histogram, ...]:
    """Return the values of the largest weights that changed, as the result computes with them."""
    old, new = before.state(), _effective(after)
    changed = [
        name
        for name, tensor in new.items()
        if name in old
        and tensor.is_floating_point()
        and tensor.numel() > _BINS
        and tensor.device.type != "meta"
        and old[name].device.type != "meta"
        and tensor is not old[name]
    ]
    largest = set(sorted(changed, key=lambda name: -new[name].numel())[:_HISTOGRAMS])
    return tuple(_histogram(name, old[name], new[name]) for name in changed if name in largest)


_QUANTIZERS: Final = frozenset({"binarize", "codebook", "fake_quant", "float_quant", "stack_quant"})


def _effective(program: Program) -> dict[str, torch.Tensor]:
    """Return the state, each fake-quantised weight as the value it stands for."""
    state = program.state()
    for node in program.nodes:
        if node.op != "call_module" or op_name(node) not in _QUANTIZERS:
            continue
        source = node.all_input_nodes[0]
        if op_name(source) == "mask":
            source = source.all_input_nodes[0]
        if source.op == "get_attr" and str(source.target) in state:
            quantiser = program.module.get_submodule(str(node.target))
            with torch.no_grad():
                state[str(source.target)] = quantiser(state[str(source.target)])
    return state


def _histogram(name: str, before: torch.Tensor, after: torch.Tensor) -> Histogram:
    old, new = before.detach().float().flatten(), after.detach().float().flatten()
    low = float(min(old.min(), new.min()))
    high = float(max(old.max(), new.max()))
    if low == high:
        low, high = low - 0.5, high + 0.5
    return Histogram(
        name=name,
        low=low,
        high=high,
        before=tuple(int(n) for n in torch.histc(old, _BINS, low, high)),
        after=tuple(int(n) for n in torch.histc(new, _BINS, low, high)),
    )
