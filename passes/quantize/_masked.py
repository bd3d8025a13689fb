"""A weight under a mask is quantised behind it: parameter, mask, quantizer, layer."""

from typing import cast

from torch import fx

from fxcompress.ir.ops import op_name

__all__ = ["unmasked"]


def unmasked(weight: fx.Node) -> fx.Node:
    """Return what a weight operand is without the mask that it may have."""
    return cast(fx.Node, weight.args[0]) if op_name(weight) == "mask" else weight
