"""Write weights onto their grids, and check that they are read back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxcompress.errors import PassError
from fxcompress.nn.packing import unpack

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter
    from passes.quantize.adaround import AdaroundDecision, RoundedWeight

__all__ = ["check", "write"]


def write(rewriter: GraphRewriter, decision: AdaroundDecision) -> None:
    """Set each weight to what its integers stand for."""
    for declined in decision.declined:
        rewriter.decline(declined.node, declined.reason, declined.because_of)
    for unit in decision.units:
        for each in unit.weights:
            if f"{each.path}.integers" not in decision.arrays:
                continue
            fake: Any = rewriter.get_module(each.path)
            value = rewriter.get_tensor(each.tensor)
            integers = _integers(each, fake, value, decision.arrays)
            rewriter.set_tensor(each.tensor, fake.dequantize(integers, value.dtype), tied=True)


def _integers(weight: RoundedWeight, fake: Any, like: Tensor, arrays: Mapping[str, Any]) -> Tensor:
    packed = torch.as_tensor(arrays[f"{weight.path}.integers"])
    unsigned = unpack(packed, weight.bits, like.numel()).to(torch.int32)
    signed: Tensor = unsigned + fake.qmin
    return signed.reshape(like.shape).to(like.device)


def check(before: Program, after: Program, decision: AdaroundDecision) -> None:
    """Check that every weight is read back as its integers by the quantizer that it had.

    Raises:
        PassError: One is not.
    """
    state = after.state()
    for unit in decision.units:
        for each in unit.weights:
            if f"{each.path}.integers" not in decision.arrays:
                continue
            fake: Any = after.module.get_submodule(each.path)
            old: Any = before.module.get_submodule(each.path)
            same = torch.equal(fake.scale, old.scale) and torch.equal(
                fake.zero_point, old.zero_point
            )
            value = state[each.tensor].detach()
            wanted = _integers(each, fake, value, decision.arrays)
            if not same or not torch.equal(fake.quantize(value), wanted):
                raise PassError(
                    f"{each.tensor} is not read back as the integers that were learned",
                    reason="its quantizer rounds it to others",
                    where=each.tensor,
                )
