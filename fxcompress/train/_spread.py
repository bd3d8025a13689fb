"""The losses of a training whose weights are spread over processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from fxcompress.train._objective import Objective
from fxcompress.train._sharding import fill, gather, like, shard, whole
from fxcompress.train.hooks import Hooks, Moment
from fxcompress.train.joint._losses import LossNode

if TYPE_CHECKING:
    from fxcompress.train.joint import Joint

__all__ = ["spread"]


def spread(objective: Objective, device: torch.device) -> Objective:
    """Return the same losses of copies whose weights are spread over all processes.

    Student, teacher and projectors of a joint graph are spread as one model. What losses learn
    stays whole in every process. Hooks get the module as it was, filled with whole tensors.

    Args:
        objective: The losses, of models that every process has as a whole.
        device: Where they are.
    """
    plain, joint, peer, teacher = (
        objective.module, objective.joint, objective.peer, objective.teacher
    )  # fmt: skip
    if joint is None:
        module = shard(plain, device)
    else:
        joint = _joint(joint, device)
        module = _student(joint)
    if teacher is not None and any(True for _ in teacher.parameters()):
        teacher = shard(teacher, device)
    if peer is not None:
        peer = replace(peer, module=shard(peer.module, device))
    made = Objective(
        module, teacher, objective.own, _on_whole(objective.hooks, plain, module), joint, peer
    )
    # The metric is measured on the module as it was.
    made.scheduled += objective.scheduled
    return made


def _joint(joint: Joint, device: torch.device) -> Joint:
    losses = [each for each in joint.module.modules() if isinstance(each, LossNode)]
    root = shard(joint.module, device, losses)
    assert isinstance(root, fx.GraphModule), "it is the copy of one"
    return replace(joint, program=replace(joint.program, module=root))


def _student(joint: Joint) -> nn.Module:
    """Return the student's part of a joint graph: its modules and tensors by their names."""
    names, held = joint.names, nn.Module()
    others = (names.teacher, names.projectors, names.losses)
    parts = joint.module._modules.items()
    held._modules.update({name: part for name, part in parts if name not in others})
    held._parameters.update(joint.module._parameters)
    held._buffers.update(joint.module._buffers)
    return held


class _Applied(nn.Module):
    """Calls a function with a module whose parameters a caller may replace."""

    def __init__(self, module: nn.Module, function: Any) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, moment: Moment) -> Tensor:
        found: Tensor = self.function(self.module, moment)
        return found


def _on_whole(hooks: Hooks, plain: nn.Module, module: nn.Module) -> Hooks:
    """Return hooks that see whole tensors, and whose changes are spread again.

    Every process computes the same from the same tensors.
    """
    penalty, on_gradients, after_step = hooks.penalty, hooks.on_gradients, hooks.after_step
    # While a model runs, FSDP puts gathered tensors in the place of these.
    parts = dict(module.named_parameters())
    pairs = [(own, parts[name]) for name, own in plain.named_parameters()]

    def penalised(_: nn.Module, moment: Moment) -> Tensor:
        values = {f"module.{name}": _differentiable(part) for name, part in parts.items()}
        found: Tensor = functional_call(_Applied(plain, penalty), values, (moment,))
        return found

    def changed(_: nn.Module, moment: Moment) -> None:
        assert on_gradients is not None, "it is called"
        gather(plain, module)
        for own, part in pairs:
            own.grad = None if part.grad is None else whole(part.grad)
        on_gradients(plain, moment)
        for own, part in pairs:
            part.grad = None if own.grad is None else like(own.grad, part)
            own.grad = None

    def written(_: nn.Module, moment: Moment) -> None:
        assert after_step is not None, "it is called"
        gather(plain, module)
        after_step(plain, moment)
        fill(_tensors(module), _tensors(plain))

    return Hooks(
        None if penalty is None else penalised,
        None if on_gradients is None else changed,
        None if after_step is None else written,
    )


def _differentiable(parameter: Tensor) -> Tensor:
    """Return the whole of a parameter; the gradient of each part goes to its process."""
    found: Tensor = getattr(parameter, "full_tensor", lambda: parameter)()
    return found


def _tensors(module: nn.Module) -> Mapping[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
