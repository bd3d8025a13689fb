"""The figures of a run by the names that constraints and reports use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fxcompress.spec import Figures

if TYPE_CHECKING:
    from fxcompress.analysis import CostSummary
    from fxcompress.pipeline import RunRecord

__all__ = ["costs", "figures_of", "metrics_of"]


def figures_of(record: RunRecord, higher_is_better: bool, measured: Mapping[str, float]) -> Figures:
    """Return the figures of a finished run.

    Args:
        record: What the run did.
        higher_is_better: Which way the metric improves.
        measured: Further figures of the result.
    """
    last = record.passes[-1] if record.passes else None
    result = {**costs(record.result), **measured}
    original = costs(record.original)
    if last is not None and last.to_original is not None:
        result["output_error"] = last.to_original.relative
        result["cosine"] = last.to_original.cosine
        result["sqnr"] = last.to_original.sqnr_db
    metrics = metrics_of(record)
    if metrics:
        original["metric"] = metrics[0]
        result["metric"] = metrics[max(metrics)]
    return Figures(original, result, higher_is_better)


def metrics_of(record: RunRecord) -> dict[int, float]:
    """Return the metric after each pass by its index, 0 being the original."""
    found = {0: record.original_metric}
    found.update({each.index: each.metric for each in record.passes})
    return {index: value for index, value in found.items() if value is not None}


def costs(cost: CostSummary) -> dict[str, float]:
    """Return a cost by the names that constraints use."""
    return {
        "size": cost.bytes,
        "parameters": cost.parameters,
        "macs": cost.macs,
        "nodes": cost.nodes,
        "activation_peak": cost.activation_peak,
    }
