"""The metric as a judge: of one rounded weight, and of a whole allocation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from fxcompress.errors import DataError
from fxcompress.train.data import Split
from passes._choices.outputs import Changed, output_losses
from passes.quantize._mixed.candidates import Candidate, Candidates
from passes.quantize.mixed import FLOAT

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.quantize.mixed import MixedOptions

__all__ = ["Judge", "metric_losses"]

_BESIDE: Final = 0.01


class Judge:
    """Measures the metric on samples of the calibration split.

    Raises:
        DataError: There is no metric, or the split lacks samples or labels.
    """

    def __init__(
        self, program: Program, found: Candidates, options: MixedOptions, context: Context
    ) -> None:
        if context.metric is None:
            raise DataError(
                "there is no metric to measure a loss by",
                hint="add `metric:` to the spec, or take another sensitivity and budget",
            )
        self.metric, self.weights = context.metric, found.weights
        self.changed = Changed(program)
        samples = list(context.labelled_samples("calibration", options.calibration))
        self.data = {self.metric.split: Split("calibration", samples)}
        self.original = None if context.original is None else context.original.module
        self.whole = self._measure()
        drop = options.budget.metric_drop
        self.allowed = None if drop is None else drop.of(abs(self.whole))

    def loss(self, values: Mapping[str, Tensor]) -> float:
        """Return how much worse the metric is with these weights; negative if it is better."""
        try:
            for name, value in values.items():
                self.changed.set(name, value)
            found = self._measure()
        finally:
            for name in values:
                self.changed.reset(name)
        return self.whole - found if self.metric.higher_is_better else found - self.whole

    def keeps(self, picked: Sequence[int]) -> bool:
        """Whether the metric bears the choices at these places."""
        assert self.allowed is not None, "there is a limit"
        values = {
            each.tensor: each.rounded(each.choices[place])
            for each, place in zip(self.weights, picked, strict=True)
            if each.choices[place] != FLOAT
        }
        return self.loss(values) <= self.allowed + 1e-12

    @torch.no_grad()
    def _measure(self) -> float:
        return self.metric.evaluate(self.changed.program.module, self.data, self.original)


@torch.no_grad()
def metric_losses(
    program: Program,
    judge: Judge,
    weights: Sequence[Candidate],
    context: Context,
    samples: int,
) -> list[list[float]]:
    """Return by how much each weight alone lowers the metric at each choice.

    A metric on few samples does not see most weights: a hundredth of the noise over signal of the
    outputs is added, which decides where the metric does not.
    """
    noise = output_losses(
        program, weights, context.samples("calibration", samples), context, own=False
    )
    found = []
    for index, each in enumerate(weights):
        row = []
        for bits, beside in zip(each.choices, noise[index], strict=True):
            drop = 0.0 if bits == FLOAT else judge.loss({each.tensor: each.rounded(bits)})
            row.append(max(0.0, drop) + _BESIDE * beside)
        found.append(row)
        context.progress("metric, layer", index + 1, len(weights))
    return found
