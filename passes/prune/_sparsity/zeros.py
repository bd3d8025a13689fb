"""Find the zeros of weights by a criterion: magnitude, Wanda or SparseGPT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from passes._layers.inputs import input_rows
from passes._layers.stream import Env, advance, stream
from passes.prune._sparsity.masks import pruned_weight
from passes.prune._sparsity.ranking import check_scores
from passes.prune._sparsity.sparsegpt import sparsegpt
from passes.prune._sparsity.statistics import Gram, Norms

if TYPE_CHECKING:
    from fxcompress.pipeline.context import Context
    from passes._layers.weights import Weight
    from passes.prune._sparsity.candidates import Candidates

__all__ = ["Found", "find", "scores_of"]

# Elements of Hessians that are factored at a time: 512 MiB in double precision.
_AT_ONCE = 1 << 26


@dataclass
class Found:
    """Zeros `[groups, out, columns]` by tensor, and what all entries become where computed."""

    zeros: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)


def find(candidates: Candidates, context: Context) -> Found:
    """Return the zeros of every weight of a candidates.

    Raises:
        DataError: The calibration split is missing or too small.
        NumericsError: A NaN or an infinity in weights or in what they are multiplied with.
    """
    if candidates.options.criterion == "sparsegpt":
        return _SparseGPT(candidates, context).run()
    scores = scores_of(candidates, context)
    zeros = candidates.pattern.zeros(scores)
    # What was pruned before stays so, even where less is asked for now.
    return Found({name: each | (scores[name] < 0) for name, each in zeros.items()})


def scores_of(candidates: Candidates, context: Context) -> dict[str, Tensor]:
    """Return the scores of every weight, `[groups, out, columns]`: Wanda's, or magnitudes.

    What a mask holds at zero is below all others.

    Raises:
        DataError: The calibration split is missing or too small.
        NumericsError: A NaN or an infinity in weights or in what they are multiplied with.
    """
    norms = _norms(candidates, context) if candidates.options.criterion == "wanda" else {}
    return {weight.tensor: _scores(candidates, weight, norms) for weight in candidates.weights}


def _scores(candidates: Candidates, weight: Weight, norms: dict[str, Norms]) -> Tensor:
    value = candidates.value(weight)
    scores = weight.form.rows(value if value.dtype == torch.float64 else value.float()).abs()
    if weight.tensor in norms:
        measured = norms[weight.tensor]
        measured.check()
        # Nothing is known of an expert that no token reached: its weights count alone.
        reached = measured.sum.amax(-1, keepdim=True) > 0
        factors = torch.where(reached, measured.sum.sqrt(), 1.0)
        scores = scores * factors.to(scores)[:, None, :]
    check_scores(scores, weight.tensor)
    fixed = candidates.fixed(weight)
    return scores if fixed is None else scores.masked_fill(fixed, -1.0)


def _norms(candidates: Candidates, context: Context) -> dict[str, Norms]:
    """Return the norms of the columns of every weight's inputs, in the dense model."""
    norms: dict[str, Norms] = {}
    readers = candidates.readers()
    for weight in candidates.weights:
        groups, _, columns = weight.form.rows(candidates.value(weight)).shape
        norms[weight.tensor] = Norms(weight.tensor, groups, columns)

    def see(node: fx.Node, env: Env) -> None:
        weight, reader = readers[node]
        shape = candidates.value(weight).shape
        for groups, rows in input_rows(reader, weight.form, shape, env):
            norms[weight.tensor].add(groups, rows)

    batches = context.samples("calibration", candidates.options.calibration)
    stream(candidates.scratch.program, batches, readers, see)
    return norms


class _SparseGPT:
    """Prunes layer after layer, each on what the pruned layers before it give.

    A weight that several layers read is pruned when the last of them is reached, on the inputs of
    all of them.
    """

    def __init__(self, candidates: Candidates, context: Context) -> None:
        self.candidates, self.context = candidates, context
        self.readers = candidates.readers()
        self.grams: dict[str, Gram] = {}
        self.found = Found()

    def run(self) -> Found:
        candidates = self.candidates
        batches = self.context.samples("calibration", candidates.options.calibration)
        # The copy is pruned on the way; the decision compares with the weights that were given.
        values = {each.tensor: candidates.value(each) for each in candidates.weights}
        advance(candidates.scratch.program, batches, self.readers, self._see, self._prune)
        for name, value in values.items():
            candidates.scratch.set_tensor(name, value, tied=True)
        return self.found

    def _see(self, node: fx.Node, env: Env) -> None:
        weight, reader = self.readers[node]
        value = self.candidates.value(weight)
        gram = self.grams.get(weight.tensor)
        if gram is None:
            groups, _, columns = weight.form.rows(value).shape
            gram = self.grams[weight.tensor] = Gram(weight.tensor, groups, columns)
        for part, rows in input_rows(reader, weight.form, value.shape, env):
            gram.add(part, rows)

    def _prune(self, node: fx.Node) -> None:
        weight, reader = self.readers[node]
        if reader is not weight.readers[-1]:
            return
        gram = self.grams.pop(weight.tensor)
        gram.check()
        value = self.candidates.value(weight)
        check_scores(value, weight.tensor)
        rows, zeros = self._solve(weight, weight.form.rows(value), gram.sum)
        self.found.zeros[weight.tensor] = zeros
        self.found.rows[weight.tensor] = rows
        made = pruned_weight(weight.form, value, zeros, rows)
        self.candidates.scratch.set_tensor(weight.tensor, made, tied=True)
        self.context.progress("pruning", len(self.found.zeros), len(self.candidates.weights))

    def _solve(self, weight: Weight, rows: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
        options, fixed = self.candidates.options, self.candidates.fixed(weight)
        groups, _, columns = rows.shape
        step = max(1, _AT_ONCE // columns**2)
        # Later blocks are chosen after the updates of earlier ones; one block would choose blindly.
        size = options.block or min(128, max(8, columns // 8))
        made, zeros = [], []
        for start in range(0, groups, step):
            part = slice(start, start + step)
            held = None if fixed is None else fixed[part]
            choose, width, block = self.candidates.pattern.chooser(held, size)
            solved = sparsegpt(
                rows[part],
                hessian[part],
                choose,
                width=width,
                block=block,
                damping=options.damping,
                name=weight.tensor,
            )
            made.append(solved[0])
            zeros.append(solved[1])
        # In the weight's own precision, so that what is decided is what the next layers saw.
        return torch.cat(made).to(rows.dtype), torch.cat(zeros)
