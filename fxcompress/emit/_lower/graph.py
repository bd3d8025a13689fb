"""What the graph holds: which nodes are quantizers, and of what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, cast

import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcompress.nn import (
    Binarize,
    Codebook,
    FakeQuantize,
    FloatQuantize,
    OperandConv1d,
    OperandConv2d,
    OperandConv3d,
    OperandConvTranspose1d,
    OperandConvTranspose2d,
    OperandConvTranspose3d,
    OperandEmbedding,
    OperandGRU,
    OperandLinear,
    OperandLSTM,
    OperandRNN,
    StackQuantize,
)

__all__ = [
    "CONVOLUTIONS",
    "LAYERS",
    "RECURRENT",
    "TRANSPOSED",
    "activation_bits",
    "is_quantized",
    "is_weight",
    "quantizer_of",
    "register_decomposed",
    "share_quantizers",
    "tensor_at",
]

CONVOLUTIONS: Final[dict[type[nn.Module], Callable[..., Tensor]]] = {
    OperandConv1d: F.conv1d,
    OperandConv2d: F.conv2d,
    OperandConv3d: F.conv3d,
}
TRANSPOSED: Final[dict[type[nn.Module], Callable[..., Tensor]]] = {
    OperandConvTranspose1d: F.conv_transpose1d,
    OperandConvTranspose2d: F.conv_transpose2d,
    OperandConvTranspose3d: F.conv_transpose3d,
}
LAYERS: Final = (*CONVOLUTIONS, *TRANSPOSED, OperandEmbedding, OperandLinear)
_QUANTIZERS: Final = (Binarize, Codebook, FakeQuantize, FloatQuantize, StackQuantize)
RECURRENT: Final = (OperandGRU, OperandLSTM, OperandRNN)


def quantizer_of(node: fx.Node) -> FakeQuantize | None:
    """Return the module of a fake-quantize node."""
    if node.op != "call_module" or node.graph.owning_module is None:
        return None
    found = node.graph.owning_module.get_submodule(str(node.target))
    return found if isinstance(found, FakeQuantize) else None


def is_weight(node: fx.Node) -> bool:
    """Whether a quantizer reads a parameter."""
    source = node.args[0] if node.args else None
    return isinstance(source, fx.Node) and source.op == "get_attr"


def is_quantized(module: fx.GraphModule) -> bool:
    """Whether the graph holds any quantizer with fixed or learned scales."""
    called = (node for node in module.graph.nodes if node.op == "call_module")
    return any(isinstance(_called(module, node), _QUANTIZERS) for node in called)


def share_quantizers(module: fx.GraphModule) -> None:
    """Let nodes that call one quantizer on one parameter be one node, as a tied weight has them.

    What stores its integers then finds each quantizer once.
    """
    first: dict[tuple[str, str], fx.Node] = {}
    for node in list(module.graph.nodes):
        if node.op == "call_module" and is_weight(node):
            source = cast(fx.Node, node.args[0])
            kept = first.setdefault((str(node.target), str(source.target)), node)
            if kept is not node and isinstance(_called(module, node), _QUANTIZERS):
                node.replace_all_uses_with(kept)
                module.graph.erase_node(node)
                if not source.users:
                    module.graph.erase_node(source)


def _called(module: fx.GraphModule, node: fx.Node) -> nn.Module:
    return module.get_submodule(str(node.target))


def activation_bits(module: fx.GraphModule) -> int:
    """Return the fewest bits that an activation is rounded to; 16 where none is."""
    fewest = 16
    for node in module.graph.nodes:
        if node.op == "call_module" and not is_weight(node):
            found = module.get_submodule(str(node.target))
            if isinstance(found, FakeQuantize):
                fewest = min(fewest, found.bits)
            elif isinstance(found, FloatQuantize):
                # Numbers next to each other are as far apart as with so many bits.
                fewest = min(fewest, 4)
            elif isinstance(found, Binarize):
                fewest = 1
    return fewest


def tensor_at(module: nn.Module, target: str) -> Tensor:
    """Return the parameter or buffer at a qualified name."""
    owner, _, name = target.rpartition(".")
    return cast(Tensor, getattr(module.get_submodule(owner), name))


def register_decomposed() -> Any:
    """Return `torch.ops.quantized_decomposed`, its operators registered by torch itself."""
    import torch.ao.quantization.fx._decomposed  # registers on import

    return torch.ops.quantized_decomposed
