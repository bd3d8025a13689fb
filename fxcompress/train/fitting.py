"""The training loop: one for fine-tuning, distillation and everything that trains between steps.

A training is a function of the module's weights, the data, the config and the seed. Killed and
started again with the same snapshot folder, it ends in the same bits.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from fxcompress.errors import DataError, UsageError
from fxcompress.ir import hash_tensor
from fxcompress.ir.ops import is_inplace
from fxcompress.train._augment import Augmentation
from fxcompress.train._curves import Curves, check_tensorboard
from fxcompress.train._feed import Feed
from fxcompress.train._groups import trained
from fxcompress.train._loop import FitResult, Loop, tensors_of
from fxcompress.train._modes import trainable, training
from fxcompress.train._objective import Objective, make_objective
from fxcompress.train._optimizers import Group
from fxcompress.train._rows import Rows
from fxcompress.train._sharding import gather, sharding
from fxcompress.train._snapshots import Snapshots
from fxcompress.train._spread import spread
from fxcompress.train._world import World
from fxcompress.train.config import FitConfig, ParameterGroup
from fxcompress.train.data import Split, one_split
from fxcompress.train.hooks import Hooks
from fxcompress.train.metrics import evaluating

if TYPE_CHECKING:
    from fxcompress.train.joint import Joining

__all__ = ["FitResult", "fit"]


def fit(
    module: nn.Module,
    config: FitConfig,
    data: Iterable[Any],
    *,
    teacher: nn.Module | None = None,
    names: Collection[str] | None = None,
    evaluate: Callable[[nn.Module], float | None] | None = None,
    higher_is_better: bool = True,
    seed: int = 0,
    hooks: Hooks | None = None,
    functions: Mapping[str, Callable[..., Tensor]] | None = None,
    joining: Joining | None = None,
    peer: nn.Module | None = None,
    snapshots: Path | None = None,
    curves: Path | None = None,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> FitResult:
    """Train a module in place.

    Modes, `requires_grad` and torch's generators are left as they were found.

    Args:
        module: What to train: a copy, if the original is still needed.
        config: How.
        data: A Split, or any re-iterable of `(batch, target)`.
        teacher: What `soft_labels` and `mse` compare with; run in eval mode without gradients.
        names: The parameters to train; all that require gradients if None.
        evaluate: Measures the module after each epoch.
        higher_is_better: Which way that improves.
        seed: Decides on the order of the data and on what the model draws.
        hooks: What else to do in each step.
        functions: The functions of `custom` losses, by what their `factory` says.
        joining: The Programs of module and teacher, where losses read taps.
        peer: A model that is trained along and teaches in the teacher's place, while the module
            teaches it; it is changed in place, too.
        snapshots: Where to keep what a killed training resumes from.
        curves: Where TensorBoard's files go, if the config asks for them.
        progress: Called with `(text, step, steps)`.

    Raises:
        UsageError: The optimiser, the scheduler or what they are told cannot be; or the peer
            starts as the module does.
        SelectorError: A group of parameters matches nothing.
        DataError: The data are empty, fail, or do not fit the losses.
        NumericsError: The loss or the metric is no finite number.
        RunFolderError: A snapshot is damaged or of another training, or cannot be written.
    """
    if config.needs_teacher and teacher is None and joining is None and peer is None:
        raise UsageError("a loss compares with a teacher, and there is none")
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    world = World.here(device, sharded=sharding())
    world.same([tensor for _, tensor in tensors_of(module)])
    chosen = [name for _, found in _grouped(module, config, names) for name in found]
    world.check_same({"seed": str(seed), **_options(config), "trained": " ".join(chosen)})
    feed = _feed(config, data, seed)
    objective = make_objective(
        module,
        config,
        hooks or Hooks(),
        seed,
        teacher=teacher,
        functions=functions,
        joining=joining,
        peer=peer,
    )
    world.same(list(objective.state().values()))
    if world.sharded:
        objective = spread(objective, device)
    loop = Loop(
        module=objective.module,
        plain=module,
        config=config,
        feed=feed,
        objective=objective,
        groups=_members(_grouped(objective.module, config, names), objective),
        world=world,
        evaluate=evaluate,
        upwards=higher_is_better and evaluate is not None,
        seed=seed,
        hooks=objective.hooks,
        snapshots=_snapshots(
            snapshots, module, config, seed, chosen, world, _teaching(teacher or peer, joining)
        ),
        curves=_curves(config, curves, world),
        report=progress if world.rank == 0 else None,
    )
    with _left_as_found(loop):
        done = loop.run()
    if world.sharded:
        gather(module, objective.module)
        if peer is not None and objective.peer is not None:
            gather(peer, objective.peer.module)
    return done


def _grouped(
    module: nn.Module, config: FitConfig, names: Collection[str] | None
) -> list[tuple[ParameterGroup | None, dict[str, nn.Parameter]]]:
    return trained(config.groups, trainable(module, names))


def _feed(config: FitConfig, data: Iterable[Any], seed: int) -> Feed:
    split = data if isinstance(data, Split) else one_split(config.split, data, "the data")
    _check_filled(split)
    change = None if config.augment is None else Augmentation(config.augment)
    return Feed(split, config.shuffle, seed, change)


def _members(
    groups: Sequence[tuple[ParameterGroup | None, Mapping[str, nn.Parameter]]], objective: Objective
) -> tuple[Group, ...]:
    """Return the groups of the optimiser; what losses and projectors learn is one of its own."""
    members: list[Group] = [(own, tuple(found.values())) for own, found in groups]
    if extra := tuple(objective.parameters().values()):
        members.append((None, extra))
    return tuple(members)


def _check_filled(split: Split) -> None:
    """Refuse a built-in split that does not fill one batch.

    Raises:
        DataError: It does not.
    """
    source = split.source
    if not isinstance(source, Rows):
        return
    samples = min(source.samples, split.limit or source.samples)
    if samples < source.batch:
        raise DataError(
            f"split {split.name} holds {samples} samples, fewer than one batch of {source.batch}",
            hint=f"write `batch: {samples}`, or give the split more samples",
            where=split.name,
        )


def _curves(config: FitConfig, folder: Path | None, world: World) -> Curves:
    if not config.tensorboard or world.rank:
        return Curves(None)
    if folder is None:
        raise UsageError(
            "there is no folder for TensorBoard's files",
            hint="run the spec in a run folder, or leave `tensorboard` out",
        )
    check_tensorboard()
    return Curves(folder)


@contextmanager
def _left_as_found(loop: Loop) -> Iterator[None]:
    """Put modes, `requires_grad` and torch's generators back after a training."""
    cuda = any(each.is_cuda for each in loop.parameters)
    devices = list(range(torch.cuda.device_count())) if cuda else []
    keeps = loop.config.batch_norm == "train"
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        for model in loop.objective.models:
            stack.enter_context(training(model, loop.parameters, batch_norm=keeps))
        stack.enter_context(evaluating(loop.objective.teacher))
        if loop.world.sharded and not _writes(loop.plain):
            stack.enter_context(warnings.catch_warnings())
            # Harmless where nothing writes into such a view.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        yield


def _writes(module: nn.Module) -> bool:
    """Whether a module may write into values; a Program's does not."""
    return not isinstance(module, fx.GraphModule) or any(map(is_inplace, module.graph.nodes))


def _snapshots(
    folder: Path | None,
    module: nn.Module,
    config: FitConfig,
    seed: int,
    chosen: Collection[str],
    world: World,
    teacher: nn.Module | None,
) -> Snapshots:
    # What tells trainings apart is a hash of all weights: only for those that are kept.
    identity = {} if folder is None else _identity(module, config, seed, chosen)
    if folder is not None and teacher is not None:
        identity["taught by"] = _digest(teacher)
    if not world.alone:
        identity["processes"] = str(world.size)
    return Snapshots(folder, identity)


def _identity(
    module: nn.Module, config: FitConfig, seed: int, chosen: Collection[str]
) -> dict[str, str]:
    """Return what tells one training from another."""
    names = hashlib.sha256("\n".join(chosen).encode()).hexdigest()
    return {
        **_options(config),
        "seed": str(seed),
        "start": _digest(module),
        "parameters": names[:16],
    }


def _digest(module: nn.Module) -> str:
    """Return a short hash of all tensors of a module."""
    found = hashlib.sha256()
    for name, tensor in tensors_of(module):
        found.update(f"{name} {hash_tensor(tensor)}\n".encode())
    return found.hexdigest()[:16]


def _teaching(teacher: nn.Module | None, joining: Joining | None) -> nn.Module | None:
    joined = None if joining is None or joining.teacher is None else joining.teacher.module
    return teacher or joined


def _options(config: FitConfig) -> dict[str, str]:
    return {
        name: str(value) for name, value in config.model_dump(mode="json", by_alias=True).items()
    }
