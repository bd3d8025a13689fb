"""`fxcompress bench`: original and result side by side, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from fxcompress.cli._command import Outcome, document_options, emits, existing

if TYPE_CHECKING:
    from rich.table import Table

    from fxcompress.ir import Program

__all__ = ["command"]


@click.command("bench")
@existing("run")
@click.option("--spec", type=click.Path(path_type=Path), help="Measure this spec's metric too.")
@click.option("--repeats", type=click.IntRange(2), default=20, show_default=True)
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    type=click.Choice(["torch", "onnxruntime", "openvino", "executorch", "inductor"]),
    help="Where to measure; may be repeated. Without: torch and each with an artefact.",
)
@click.option("--batch", type=click.IntRange(1), help="Size of the dim called `batch`.")
@document_options
@emits
def command(
    run: Path, spec: Path | None, repeats: int, runtimes: tuple[str, ...], batch: int | None
) -> Outcome:
    """Measure latency, size and metric of a run's original and result, taking turns.

    In `torch` both run as graphs in which fake-quantised layers compute in floats. In any other
    runtime the run's artefact is opened, and the original is emitted for it, in float.
    """
    from fxcompress.cli._finish import measure_latency
    from fxcompress.cli._progress import working
    from fxcompress.cli._runtimes import choose_runtimes, measure_runtime
    from fxcompress.cli._specs import load_programs

    chosen = choose_runtimes(run, runtimes)
    record, original, result = load_programs(run)
    times = {}
    for name in chosen:
        with working(f"measuring latency in {name}"):
            if name == "torch":
                times[name] = measure_latency(original, result, batch=batch, repeats=repeats)
            else:
                times[name] = measure_runtime(name, run, original, batch=batch, repeats=repeats)
    rows: dict[str, dict[str, float]] = {}
    for runtime, found in times.items():
        medians = {name: each.median_ms for name, each in found.items()}
        spreads = {name: 100 * each.spread for name, each in found.items()}
        rows |= {f"{runtime} (ms)": medians, f"{runtime} spread (%)": spreads}
    rows |= {
        "weights (bytes)": {"original": record.original.bytes, "result": record.result.bytes},
        "parameters": {"original": record.original.parameters, "result": record.result.parameters},
        "MACs": {"original": record.original.macs, "result": record.result.macs},
    }
    if spec is not None:
        with working("measuring the metric"):
            rows.update(_metric(spec, original, result))
    document = {"run": str(run), "figures": rows, "repeats": repeats, "batch": batch}
    return Outcome(_table(rows), document)


def _metric(path: Path, original: Program, result: Program) -> dict[str, dict[str, float]]:
    """Measure a spec's metric on both Programs."""
    from fxcompress.errors import UsageError
    from fxcompress.spec import Spec, load_data, load_metric

    spec = Spec.load(path)
    metric, data = load_metric(spec), load_data(spec)
    if metric is None:
        raise UsageError(f"{path} has no metric")
    both = {"original": original, "result": result}
    values = {
        name: metric.evaluate(each.module, data, original.module) for name, each in both.items()
    }
    return {metric.name: values}


def _table(rows: dict[str, dict[str, float]]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("", "original", "result", "ratio"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, values in rows.items():
        before, after = values["original"], values["result"]
        ratio: Any = f"{after / before:.3f}" if before and "spread" not in name else ""
        table.add_row(name, _number(before), _number(after), ratio)
    return table


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
