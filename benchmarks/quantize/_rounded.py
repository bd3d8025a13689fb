"""Quantise the models of the examples by single passes, and judge them on their evaluation data."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxcompress.analysis.cost import cost
from fxcompress.ir import Program
from fxcompress.ir.ops import op_name
from fxcompress.pipeline import Context
from fxcompress.rewrite import GraphRewriter
from fxcompress.spec import Spec, load_data, load_metric, load_program, parse_steps
from fxcompress.train.metrics import call, main_output

__all__ = ["Bench", "Figures"]

SPECS = Path(__file__).parents[2] / "specs"


@dataclass(frozen=True)
class Figures:
    """What a model comes to: metric, SQNR in dB, mean cosine of its outputs, bytes, CPU seconds."""

    metric: float
    sqnr: float
    cosine: float
    bytes: int
    seconds: float


class Bench:
    """An example's model, batch norms folded, with its data and metric."""

    def __init__(self, name: str, batches: int | None = None) -> None:
        spec = Spec.load(SPECS / name / "spec.yaml")
        self.data = dict(load_data(spec))
        if batches is not None:
            self.data["eval"] = list(islice(self.data["eval"], batches))
        metric = load_metric(spec)
        assert metric is not None, "the example has a metric"
        self.metric = metric
        self.program = load_program(spec)
        if any(op_name(node) == "batch_norm" for node in self.program.nodes):
            self.program, _ = self.run(self.program, {"use": "tidy.fold_batchnorm"})
        self.wanted = list(self._outputs(self.program))

    def run(self, program: Program, entry: Mapping[str, Any]) -> tuple[Program, float]:
        """Return what a pass makes of a Program, and the CPU seconds of its decision."""
        (parsed,) = parse_steps([dict(entry)])
        torch.manual_seed(0)
        context = Context(data=self.data, original=program, metric=self.metric)
        start = time.process_time()
        decision = parsed.pass_.decide(program, parsed.options, context)
        seconds = time.process_time() - start
        rewriter = GraphRewriter(program)
        with torch.no_grad():
            parsed.pass_.rewrite(rewriter, decision)
        return rewriter.finish(), seconds

    def figures(self, program: Program, seconds: float = 0.0) -> Figures:
        """Judge a Program on the split `eval`."""
        value = self.metric.evaluate(program.module, {"eval": self.data["eval"]}, None)
        noise = signal = 0.0
        cosines = []
        for wanted, got in zip(self.wanted, self._outputs(program), strict=True):
            noise += float((got - wanted).double().square().sum())
            signal += float(wanted.double().square().sum())
            cosines.append(torch.cosine_similarity(got.flatten(1), wanted.flatten(1)))
        sqnr = 10 * float(torch.log10(torch.tensor(signal / max(noise, 1e-30))))
        return Figures(
            value, sqnr, float(torch.cat(cosines).mean()), cost(program).bytes, round(seconds, 1)
        )

    @torch.no_grad()
    def _outputs(self, program: Program) -> Iterator[Tensor]:
        program.module.eval()
        for batch, _ in self.data["eval"]:
            yield main_output(call(program.module, batch)).float()
