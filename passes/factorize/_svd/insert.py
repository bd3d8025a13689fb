"""Put two layers in the place of one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from fxcompress.errors import PassError
from fxcompress.ir.ops import bind
from passes._paths import scope_beside

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter
    from passes.factorize.svd import SvdDecision, SvdEntry

__all__ = ["check_inserted", "insert"]

_CONVOLUTIONS: Final[dict[str, Any]] = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
}


def insert(rewriter: GraphRewriter, decision: SvdDecision) -> None:
    """Let every call of a factorised layer be a call of A and one of B."""
    for declined in decision.declined:
        rewriter.decline(declined.node, declined.reason, declined.because_of)
    for entry in decision.layers:
        if entry.rank is None:
            continue
        down, up = _layers(rewriter, entry, decision)
        modules: dict[str, nn.Module | None] = {"A": down, "B": up}
        for name in entry.nodes:
            base = rewriter.node(name)
            value = bind(base)["mat1" if entry.op == "addmm" else "input"]
            last = base
            for part in ("A", "B"):
                module, modules[part] = modules[part], None
                value = last = rewriter.call_module(
                    f"{entry.path}.{part}", module, (value,), after=last, scope=scope_beside(base)
                )
            rewriter.replace_uses(base, value)


def _layers(
    rewriter: GraphRewriter, entry: SvdEntry, decision: SvdDecision
) -> tuple[nn.Module, nn.Module]:
    """Return A and B with their values; of no values yet in a plan."""
    state = rewriter.program.state()
    weight = state[entry.weight]
    with torch.device("meta"):
        down, up = _shapes(rewriter, entry, weight)
    bias = None if entry.bias is None else state[entry.bias]
    for name, layer, like in (("A", down, weight), ("B", up, weight)):
        values: list[tuple[str, Tensor]] = [("weight", like)]
        if name == "B" and bias is not None:
            values.append(("bias", bias))
        for tensor, old in values:
            shape = getattr(layer, tensor).shape
            held = decision.arrays.get(f"{entry.path}.{name}.{tensor}")
            made = _value(held, old, shape, entry, name, tensor)
            setattr(layer, tensor, nn.Parameter(made, requires_grad=old.requires_grad))
    return down, up


def _value(
    held: Any, old: Tensor, shape: torch.Size, entry: SvdEntry, name: str, tensor: str
) -> Tensor:
    if held is None:
        return torch.zeros(shape, dtype=old.dtype, device=old.device)
    value = torch.as_tensor(held).to(old.dtype).to(old.device)
    if name == "A" and tensor == "weight" and len(shape) > 2:
        # Columns run over the taps and, innermost, over the input channels.
        rank, channels, *kernel = shape
        return value.reshape(rank, *kernel, channels).movedim(-1, 1).contiguous()
    return value.reshape(shape).clone()


def _shapes(rewriter: GraphRewriter, entry: SvdEntry, weight: Tensor) -> tuple[Any, Any]:
    rank, bias = entry.rank, entry.bias is not None
    if entry.op in _CONVOLUTIONS:
        layer: Any = rewriter.get_module(entry.layer)
        made = _CONVOLUTIONS[entry.op]
        down = made(
            weight.shape[1], rank, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
            bias=False, padding_mode=layer.padding_mode,
        )  # fmt: skip
        return down, made(rank, weight.shape[0], 1, bias=bias)
    into, out = (0, 1) if entry.op == "addmm" else (1, 0)
    return (
        nn.Linear(weight.shape[into], rank or 0, bias=False),
        nn.Linear(rank or 0, weight.shape[out], bias=bias),
    )


def check_inserted(after: Program, decision: SvdDecision) -> None:
    """Check that the factors have their ranks, and that nothing of the weights is left.

    Raises:
        PassError: They do not, or something is.
    """
    state = after.state()
    for entry in decision.layers:
        if entry.rank is None:
            continue
        down = state.get(f"{entry.path}.A.weight")
        up = state.get(f"{entry.path}.B.weight")
        if down is None or up is None or not down.shape[0] == up.shape[1] == entry.rank:
            raise PassError(f"{entry.layer} is not of rank {entry.rank}", where=entry.path)
        if entry.weight in state:
            raise PassError(f"the weight {entry.weight} is left", where=entry.layer)
