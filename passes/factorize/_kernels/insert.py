"""Put a chain of convolutions in the place of one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from fxcompress.errors import PassError
from fxcompress.ir.ops import bind
from passes._paths import scope_beside

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter
    from passes.factorize._kernels.model import KernelDecision, KernelEntry, Part

__all__ = ["check_inserted", "insert"]

_CONVOLUTIONS: Final[dict[int, Any]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def insert(rewriter: GraphRewriter, decision: KernelDecision) -> None:
    """Let every call of a factorised convolution be a call of each of its parts."""
    for declined in decision.declined:
        rewriter.decline(declined.node, declined.reason, declined.because_of)
    for entry in decision.layers:
        if entry.ranks is None:
            continue
        modules: dict[str, nn.Module | None] = {
            part.name: _convolution(rewriter, entry, part, decision) for part in entry.parts
        }
        for name in entry.nodes:
            base = rewriter.node(name)
            value, last = bind(base)["input"], base
            for part in entry.parts:
                module, modules[part.name] = modules[part.name], None
                value = last = rewriter.call_module(
                    f"{entry.path}.{part.name}",
                    module,
                    (value,),
                    after=last,
                    scope=scope_beside(base),
                )
            rewriter.replace_uses(base, value)


def _convolution(
    rewriter: GraphRewriter, entry: KernelEntry, part: Part, decision: KernelDecision
) -> nn.Module:
    """Return one part with its values; zeros in a plan."""
    state = rewriter.program.state()
    last = part is entry.parts[-1]
    with torch.device("meta"):
        made: nn.Module = _CONVOLUTIONS[len(part.kernel)](
            part.inputs, part.outputs, part.kernel, part.stride, part.padding, part.dilation,
            groups=part.groups, bias=last and entry.bias is not None,
            padding_mode=part.padding_mode,
        )  # fmt: skip
    names = {"weight": entry.weight}
    if last and entry.bias is not None:
        names["bias"] = entry.bias
    for tensor, source in names.items():
        old = state[source]
        held = decision.arrays.get(f"{entry.path}.{part.name}.{tensor}")
        shape = getattr(made, tensor).shape
        if held is not None:
            value = torch.as_tensor(held).to(old.dtype).to(old.device).reshape(shape).clone()
        elif tensor == "bias":
            value = old.detach().clone()
        else:
            value = torch.zeros(shape, dtype=old.dtype, device=old.device)
        setattr(made, tensor, nn.Parameter(value, requires_grad=old.requires_grad))
    return made


def check_inserted(after: Program, decision: KernelDecision) -> None:
    """Check that every part has the shape that was decided, and that no replaced weight is left.

    Raises:
        PassError: A part has not, or a weight is left.
    """
    state = after.state()
    for entry in decision.layers:
        if entry.ranks is None:
            continue
        for part in entry.parts:
            weight = state.get(f"{entry.path}.{part.name}.weight")
            if weight is None or weight.numel() != part.parameters:
                raise PassError(
                    f"{part.name} of {entry.layer} is not as decided",
                    reason=f"it has {part.parameters} weights in the decision",
                    where=entry.path,
                )
        if entry.weight in state:
            raise PassError(f"the weight {entry.weight} is left", where=entry.layer)
