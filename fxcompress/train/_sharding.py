"""Weights spread over processes: FSDP2, as `accelerate launch --use_fsdp` asks for it.

Each module that is called is a group of its own: its weights are gathered while it runs, and its
gradients are added up and spread again. The training sees DTensors; what leaves it (metrics,
snapshots, the result) is whole tensors.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, fx, nn
from torch.utils import _pytree as pytree

from fxcompress.errors import UsageError

__all__ = ["fill", "like", "shard", "sharding", "whole"]


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


def shard(module: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy of a module whose parameters are spread over all processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    spread = copy.deepcopy(module)
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    reshards = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() in ("1", "true")
    for part in _called(spread):
        fully_shard(part, mesh=mesh, reshard_after_forward=reshards)
    fully_shard(spread, mesh=mesh, reshard_after_forward=reshards)
    return spread


def whole(value: Any) -> Any:
    """Return nested data with every DTensor gathered; all processes must call it."""

    def gathered(leaf: Any) -> Any:
        return leaf.detach().full_tensor() if hasattr(leaf, "full_tensor") else leaf

    return pytree.tree_map(gathered, value)


def like(value: Tensor, tensor: Tensor) -> Tensor:
    """Return a whole tensor spread as another one of its shape is, if that is."""
    if not hasattr(tensor, "full_tensor") or value.shape != tensor.shape:
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


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules with parameters that run as one: those of the graph, or the innermost."""
    if isinstance(module, fx.GraphModule):
        targets = dict.fromkeys(str(n.target) for n in module.graph.find_nodes(op="call_module"))
        found = list({id(m): m for m in map(module.get_submodule, targets)}.values())
    else:
        attention = [m for m in module.modules() if isinstance(m, nn.MultiheadAttention)]
        inside = {id(part) for each in attention for part in each.modules()}
        leaves = [m for m in module.modules() if not list(m.children()) and id(m) not in inside]
        found = [*leaves, *attention]
    yield from (m for m in found if m is not module and any(True for _ in m.parameters()))
