"""What fxcompress does with one model of the zoo: `prune.channels`, judged, and emitted."""

from __future__ import annotations

import copy
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from benchmarks.zoo import ZooModel
from benchmarks.zoo._measure import describe

from ._children import Task
from ._judge import judge
from ._masked import Removed
from ._results import Outcome
from ._sides import conclude, parameters

if TYPE_CHECKING:
    from fxcompress.axes import Analysis, Axis, Term
    from fxcompress.ir import Program
    from passes.prune.channels import ChannelsDecision

__all__ = ["decide", "prune_ours", "removed_entries", "rewrite"]

Keep = Mapping["Axis", "np.ndarray[Any, np.dtype[np.int64]]"]
_BATCH, _OTHER_BATCH = 2, 3
_CONTROLS = 8


def prune_ours(
    zoo: ZooModel, task: Task, outcome: Outcome, report: Callable[[Outcome], None]
) -> None:
    """Prune every free axis by the ratio and write down what came of it."""
    from fxcompress.axes import analyze
    from fxcompress.ir import capture
    from passes.prune._channels.shrink import KEEP

    def stage(name: str) -> None:
        outcome.stage = name
        report(outcome)

    stage("capture")
    model = zoo.build()
    original = copy.deepcopy(model)
    outcome.parameters_before = parameters(original)
    args, kwargs = zoo.inputs(_BATCH, 0)
    try:
        program = capture(model, args, kwargs, dynamic=zoo.dynamic, verify=False)
    except Exception as error:  # what does not capture is the zoo's table, not this one
        outcome.status, outcome.detail = "not captured", describe(error)
        return
    stage("decide")
    start = time.process_time()
    decision = decide(program, task.ratio)
    stage("rewrite")
    pruned = rewrite(program, decision)
    outcome.seconds = time.process_time() - start
    analysis = analyze(program)
    keep = {
        axis: np.asarray(decision.arrays[f"{KEEP}{axis.name}"])
        for axis in analysis.axes
        if f"{KEEP}{axis.name}" in decision.arrays
    }
    _write_reach(outcome, analysis, keep)
    outcome.parameters_after = parameters(pruned.module)
    stage("judge")
    if not keep:
        outcome.status, outcome.detail = "no-op", "no axis is free"
        return
    removed = removed_entries(analysis, keep)
    _require_slices(program, pruned, analysis, keep)
    conclude(outcome, original, removed, pruned.module, zoo)
    stage("control")
    if outcome.status == "right":
        outcome.control = _control(original, removed, pruned.module, zoo)
    if task.emit:
        stage("emit")
        outcome.emitted = _emit(pruned, task.emit, zoo)


def decide(program: Program, ratio: float) -> ChannelsDecision:
    """Decide as `prune.channels` does with nothing but a ratio: L2 over each group."""
    from fxcompress.pipeline import Context
    from passes.prune.channels import Channels, ChannelsOptions

    options = ChannelsOptions(ratio=ratio, max_ratio=max(ratio, 0.5))
    return Channels().decide(program, options, Context())


def rewrite(program: Program, decision: ChannelsDecision) -> Program:
    """Rewrite as the pass does."""
    from fxcompress.rewrite import GraphRewriter
    from passes.prune.channels import Channels

    rewriter = GraphRewriter(program)
    Channels().rewrite(rewriter, decision)
    return rewriter.finish()


def removed_entries(analysis: Analysis, keep: Keep) -> dict[str, dict[int, list[int]]]:
    """Say per tensor and dimension which positions are removed."""
    removed: dict[str, dict[int, list[int]]] = {}
    for name, dim, term in _dims(analysis):
        gone = _gone(term, keep)
        if gone:
            removed.setdefault(name, {})[dim] = gone
    return removed


def _dims(analysis: Analysis) -> list[tuple[str, int, Term]]:
    return [
        (name, dim, term)
        for name in analysis.tensors
        for dim, term in enumerate(analysis.places(name))
    ]


def _gone(term: Term, keep: Keep) -> list[int]:
    from fxcompress.axes.terms import mask

    return np.flatnonzero(~mask(term, keep)).tolist()


def _write_reach(outcome: Outcome, analysis: Analysis, keep: Keep) -> None:
    """Count parameters by what became of their dimensions.

    A tensor is reached if a dimension is pruned. It is prunable unless each of its dimensions is
    the model's input or output, is of size 1, or is frozen for a reason other than an op without a
    rule.
    """
    from fxcompress.axes.terms import axes_of

    state = analysis.program.state()
    reached = prunable = 0
    frozen: Counter[str] = Counter()
    for name in analysis.tensors:
        tensor = state[name]
        if not isinstance(tensor, nn.Parameter):
            continue
        axes = [axis for term in analysis.places(name) for axis in axes_of(term) if axis.size > 1]
        if any(axis in keep for axis in axes):
            reached += tensor.numel()
            prunable += tensor.numel()
            continue
        reasons = {axis.frozen.reason: axis.frozen.cause for axis in axes if axis.frozen}
        if "unknown" in reasons.values():
            prunable += tensor.numel()
        frozen.update({reason: tensor.numel() for reason in reasons})
    outcome.reached = reached / max(outcome.parameters_before, 1)
    outcome.coverage = reached / prunable if prunable else None
    outcome.frozen = dict(frozen.most_common(12))
    outcome.unknown = dict(analysis.unknown)


def _require_slices(program: Program, pruned: Program, analysis: Analysis, keep: Keep) -> None:
    """Reject a tensor whose entries are not bit for bit those that the axes say are kept."""
    from fxcompress.axes import kept

    before, after = program.state(), pruned.state()
    for name in analysis.tensors:
        expected = before[name]
        for dim, term in enumerate(analysis.places(name)):
            expected = expected.index_select(dim, torch.from_numpy(kept(term, keep)))
        if isinstance(before[name], nn.Parameter) and not torch.equal(expected, after[name]):
            raise AssertionError(f"{name} does not hold the kept entries of the original")


def _control(original: nn.Module, removed: Removed, pruned: nn.Module, zoo: ZooModel) -> bool:
    """Say whether the comparison notices one wrong channel: kept in the reference, and another not.

    The channel is that of a weight's rows, from the middle of the model outwards: a ReLU may keep a
    channel silent on the whole batch, so up to `_CONTROLS` weights, evenly spread, are tried until
    one is noticed.
    """
    weights = dict(original.named_parameters())
    rows = [
        name
        for name, dims in removed.items()
        if 0 in dims and name in weights and weights[name].ndim > 1
    ]
    middle = len(rows) // 2
    spread = range(middle % (apart := -(-len(rows) // _CONTROLS)), len(rows), apart) if rows else ()
    for name in [rows[place] for place in sorted(spread, key=lambda place: abs(place - middle))]:
        gone = list(removed[name][0])
        stays = sorted(set(range(weights[name].shape[0])) - set(gone))
        wrong = {**removed, name: {**removed[name], 0: [*gone[1:], stays[len(stays) // 2]]}}
        if not judge(original, wrong, pruned, zoo.inputs(_OTHER_BATCH, 1)).right:
            return True
    return False


def _emit(pruned: Program, form: str, zoo: ZooModel) -> str:
    """Emit, which reloads and compares in a fresh process; say what came of it."""
    from fxcompress.emit import emit

    args, kwargs = zoo.inputs(_OTHER_BATCH, 1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            emit(pruned, folder, [form], example_inputs=kwargs or args)
        except Exception as error:  # a table lists whatever is raised
            return f"✗ {describe(error)[:160]}"
    return "✓"
