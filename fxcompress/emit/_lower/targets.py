"""What each runtime wants of quantize/dequantize pairs, one row per runtime.

Signedness is chosen here and nowhere else: u8 is s8 with the zero point moved by 128, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["EXECUTORCH", "INDUCTOR", "ONNXRUNTIME", "OPENVINO", "PT2E", "TENSORRT", "Target"]


@dataclass(frozen=True)
class Target:
    """A runtime's wishes.

    Attributes:
        name: As messages call it.
        activations: uint8 or int8.
        integer_bias: A bias is int32 at s_x · s_w.
        flat: Linear layers get two dimensions.
        symmetric: Activations have the zero point 0 and use the whole range of their type.
        zero_points: Weights have zero points, all 0 where they are symmetric.
        floats: 8-bit floats that it takes.
        pairs: These are pairs of quantize and dequantize, and not arithmetic.
        exported: It reads ONNX.
    """

    name: str
    activations: torch.dtype = torch.uint8
    integer_bias: bool = False
    flat: bool = False
    symmetric: bool = False
    zero_points: bool = False
    floats: tuple[str, ...] = ("e4m3", "e5m2")
    pairs: bool = False
    exported: bool = False


PT2E = Target("PT2E backends", zero_points=True)
# onnxruntime fuses u8 activations alone: of 20 convolutions of a ResNet-18, 9 with s8. A float bias
# keeps its linear layers in float, slower than without quantization; its Gemm is 2-dimensional.
# Of pairs of 8-bit floats it makes an integer Gemm that does not take them.
ONNXRUNTIME = Target("onnxruntime", integer_bias=True, flat=True, exported=True)
# It takes the same, but a reshape between a linear layer and a GELU makes them two kernels.
OPENVINO = Target("OpenVINO", integer_bias=True, exported=True)
INDUCTOR = Target("inductor", zero_points=True)
# XNNPACK's integer kernels are s8 alone.
EXECUTORCH = Target("ExecuTorch", activations=torch.int8, zero_points=True, floats=())
TENSORRT = Target(
    "TensorRT", activations=torch.int8, symmetric=True, floats=("e4m3",), pairs=True, exported=True
)
