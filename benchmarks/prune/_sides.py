"""What each side does with one model of the zoo, in a child process."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.zoo import ZooModel, load_zoo
from benchmarks.zoo._measure import describe

from ._children import Task
from ._judge import judge
from ._masked import Removed
from ._peer import prune_with_peer, recipe
from ._results import Outcome

__all__ = ["work"]

Report = Callable[[Outcome], None]
_BATCH, _OTHER_BATCH = 1, 3
_TEXT = frozenset({"encoder", "decoder", "mixture", "encoder_decoder", "state_space"})


def work(task: Task, outcome: Outcome, report: Report) -> None:
    """Prune the task's model by the task's side and judge the result."""
    zoo = next(model for model in load_zoo() if model.id == task.model)
    try:
        if task.side == "peer":
            _peer(zoo, task, outcome, report)
        else:
            from ._ours import prune_ours

            prune_ours(zoo, task, outcome, report)
    except Exception as error:  # a table lists whatever a side raises
        outcome.status, outcome.detail = "crash", f"{outcome.stage}: {describe(error)}"


def _peer(zoo: ZooModel, task: Task, outcome: Outcome, report: Report) -> None:
    def stage(name: str) -> None:
        outcome.stage = name
        report(outcome)

    stage("build")
    if zoo.source == "timm":
        import timm

        timm.layers.set_fused_attn(False)  # TIMM_FUSED_ATTN=0 in the documented script
    model = zoo.build()
    original = copy.deepcopy(model)
    outcome.parameters_before = parameters(model)
    example = zoo.inputs(_BATCH, 0)
    how = recipe(model, example, text=bool(_TEXT & zoo.tags))
    stage("prune")
    run = prune_with_peer(model, example, how, task.ratio)
    outcome.seconds = run.seconds
    outcome.parameters_after = parameters(model)
    outcome.reached = reached(original, model)
    stage("run")
    if not outcome.reached:
        outcome.status, outcome.detail = "no-op", "no parameter was pruned"
        return
    inputs = zoo.inputs(_OTHER_BATCH, 1)
    with torch.no_grad():
        model(*inputs[0], **inputs[1])
    stage("judge")
    if run.unjudged:
        outcome.status, outcome.detail = "unjudged", run.unjudged
        return
    conclude(outcome, original, run.removed, model, zoo)


def conclude(
    outcome: Outcome, original: nn.Module, removed: Removed, pruned: nn.Module, zoo: ZooModel
) -> None:
    """Judge a pruned model on a batch it has not seen and write the verdict down."""
    verdict = judge(original, removed, pruned, zoo.inputs(_OTHER_BATCH, 1))
    outcome.error = verdict.error
    outcome.status = "right" if verdict.right else "wrong"
    outcome.detail = verdict.detail


def parameters(model: nn.Module) -> int:
    """Count parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def reached(original: nn.Module, pruned: nn.Module) -> float:
    """Return the share of parameters in tensors whose shape has changed."""
    shapes = {name: p.shape for name, p in pruned.named_parameters(remove_duplicate=False)}
    total = changed = 0
    for name, parameter in original.named_parameters():
        total += parameter.numel()
        changed += parameter.numel() * (shapes.get(name, parameter.shape) != parameter.shape)
    return changed / max(total, 1)
