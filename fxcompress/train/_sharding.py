"""Weights spread over processes: FSDP2, as `accelerate launch --use_fsdp` asks for it.

Each module that is called is a group of its own: its weights are gathered while it runs, and its
gradients are added up and spread again. Weights that several modules share, or that the graph reads
by itself, are one group with the root, gathered as long as the model runs. A parameter without
dims cannot be cut: each process has it, as it has the parameters of losses. The training sees
DTensors; what leaves it (metrics, snapshots, the result) is whole tensors.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, fx, nn
from torch.utils import _pytree as pytree

from fxcompress.errors import UsageError
from fxcompress.ir._copying import assemble, copy_module, copy_tree

__all__ = [
    "clip_norm",
    "fill",
    "gather",
    "is_spread",
    "kinds",
    "like",
    "shard",
    "sharding",
    "whole",
]

T = TypeVar("T")


def sharding() -> bool:
    """Whether several processes were started and the launcher asked for FSDP2.

    Raises:
        UsageError: It asked for FSDP1.
    """
    joined = distributed.is_available() and distributed.is_initialized()
    if not joined or os.environ.get("ACCELERATE_USE_FSDP", "").lower() not in ("1", "true"):
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UsageError(
            "training shards weights with FSDP2 alone",
            reason="the launcher asks for FSDP1, which torch is giving up",
            hint="start it with `accelerate launch --use_fsdp --fsdp_version 2`",
        )
    return True


def shard(module: nn.Module, device: torch.device, kept: Collection[nn.Module] = ()) -> nn.Module:
    """Return a copy of a module whose parameters are spread over all processes.

    Buffers are the module's own, and names stand in its order.

    Args:
        module: What is spread.
        device: Where it is.
        kept: Modules inside it that stay what they are: the copy has the same ones.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    spread = _copied(module, kept)
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    told: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()
        in ("1", "true"),
        "ignored_params": set(_uncut(spread, kept)) or None,
    }
    for part in _called(spread, kept):
        fully_shard(part, **told)
    fully_shard(spread, **told)
    return spread


def gather(plain: nn.Module, spread: nn.Module) -> None:
    """Write the whole tensors of a spread copy into the module; all processes must call it."""
    values = dict(_tensors_of(spread))
    for name, tensor in _tensors_of(plain):
        fill({name: tensor}, {name: whole(values[name])})


def is_spread(value: Any) -> bool:
    """Whether this process has a part of a tensor."""
    return hasattr(value, "full_tensor")


def whole(value: Any) -> Any:
    """Return nested data with every DTensor gathered; all processes must call it."""

    def gathered(leaf: Any) -> Any:
        return leaf.detach().full_tensor() if is_spread(leaf) else leaf

    return pytree.tree_map(gathered, value)


def like(value: Tensor, tensor: Tensor) -> Tensor:
    """Return a whole tensor spread as another one of its shape is, if that is."""
    if not is_spread(tensor) or value.shape != tensor.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(value, DTensor):
        return value
    assert isinstance(tensor, DTensor), "nothing else can be gathered"
    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)


@torch.no_grad()
def fill(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Write values, whole or spread, into tensors of the same names."""
    for name, tensor in tensors.items():
        tensor.copy_(like(values[name], tensor))


def kinds(items: Iterable[T], tensor: Callable[[T], Tensor]) -> list[list[T]]:
    """Return items whose tensors are spread, and those whose are whole: no operation mixes them.

    A kind that is not there is left out.
    """
    found: dict[bool, list[T]] = {True: [], False: []}
    for item in items:
        found[is_spread(tensor(item))].append(item)
    return [each for each in found.values() if each]


def clip_norm(parameters: Iterable[nn.Parameter], most: float) -> None:
    """Scale gradients, spread or not, so that their common norm is no longer than `most`."""
    parts = kinds((p for p in parameters if p.grad is not None), lambda p: p)
    if not parts:
        return
    gradients = ([p.grad for p in part if p.grad is not None] for part in parts)
    norms = [whole(nn.utils.get_total_norm(each)) for each in gradients]
    total = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    for part in parts:
        nn.utils.clip_grads_with_norm_(part, most, total)


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _copied(module: nn.Module, kept: Collection[nn.Module]) -> nn.Module:
    """Return a copy with parameters of its own, of the same memory; hooks are not shared."""
    fixed = {id(each) for part in kept for each in part.parameters()}
    instead: dict[int, Any] = {id(part): part for part in kept}
    for each in module.parameters():
        if id(each) not in fixed:
            data = each.detach().contiguous()
            instead[id(each)] = nn.Parameter(data, requires_grad=each.requires_grad)
    if not isinstance(module, fx.GraphModule):
        return copy_tree(module, instead)
    # Copied by itself, a graph module would have its parts in the order of the graph.
    holder = nn.Module()
    for table in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        getattr(holder, table).update(getattr(module, table))
    holder.training = module.training
    graph = copy_module(module).graph
    return assemble(copy_tree(holder, instead), graph, module.__class__.__name__)


def _uncut(module: nn.Module, kept: Collection[nn.Module]) -> Iterator[nn.Parameter]:
    """Yield the parameters that every process has."""
    for part in kept:
        yield from part.parameters()
    yield from (each for each in module.parameters() if each.dim() == 0)


def _called(module: nn.Module, kept: Collection[nn.Module]) -> Iterator[nn.Module]:
    """Yield the modules with parameters that run as one: those of the graph, or the innermost."""
    read: set[int] = set()
    if isinstance(module, fx.GraphModule):
        targets = dict.fromkeys(str(n.target) for n in module.graph.find_nodes(op="call_module"))
        found = list({id(m): m for m in map(module.get_submodule, targets)}.values())
        nodes = module.graph.find_nodes(op="get_attr")
        read = {id(reduce(getattr, str(node.target).split("."), module)) for node in nodes}
    else:
        attention = [m for m in module.modules() if isinstance(m, nn.MultiheadAttention)]
        inside = {id(part) for each in attention for part in each.modules()}
        leaves = [m for m in module.modules() if not list(m.children()) and id(m) not in inside]
        found = [*leaves, *attention]
    tables = [each._parameters.values() for each in module.modules()]
    uses = Counter(id(each) for table in tables for each in table if each is not None)
    for part in found:
        own = [id(each) for each in part.parameters()]
        alone = all(uses[each] == 1 and each not in read for each in own)
        if own and alone and part is not module and part not in kept:
            yield part
