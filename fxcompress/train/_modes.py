"""What of a module is trained, and the modes that its parts are in meanwhile."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxcompress.errors import UsageError

__all__ = ["trainable", "training"]


def trainable(module: nn.Module, names: Collection[str] | None) -> dict[str, nn.Parameter]:
    """Return the parameters to train, each once: those named, or all that require gradients.

    Raises:
        UsageError: A name is no parameter that can be trained, or there is nothing to train.
    """
    known = {
        name: parameter
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if parameter.requires_grad
    }
    for name in names or ():
        if name not in known:
            raise UsageError(
                f"{name} cannot be trained",
                reason="it is no parameter that requires gradients",
                where=name,
            )
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in known.items():
        if names is None or name in names:
            found.setdefault(id(parameter), (name, parameter))
    if not found:
        raise UsageError(
            "there is nothing to train", reason="no parameter of the model requires gradients"
        )
    return dict(found.values())


@contextmanager
def training(
    module: nn.Module, parameters: Collection[nn.Parameter], *, batch_norm: bool
) -> Iterator[None]:
    """Put a module into training mode, with gradients for these parameters alone.

    Batch norms keep their statistics where `batch_norm` is False, and where none of their
    parameters is trained although others of the model are.
    """
    chosen = {id(parameter) for parameter in parameters}
    everything = all(id(p) in chosen or not p.requires_grad for p in module.parameters())
    modes = [(each, each.training) for each in module.modules()]
    flags = [(each, each.requires_grad) for each in module.parameters()]
    try:
        module.train()
        for each, flag in flags:
            each.requires_grad_(flag and id(each) in chosen)
        for part in module.modules():
            if isinstance(part, _BatchNorm):
                own = [id(p) in chosen for p in part.parameters(recurse=False)]
                part.train(batch_norm and (any(own) if own else everything))
        yield
    finally:
        for part, mode in modes:
            part.training = mode
        for each, flag in flags:
            each.requires_grad_(flag)
            each.grad = None
