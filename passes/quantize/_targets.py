"""Which integer kernels each runtime has: the placement rules, a row per target.

The kernels of CPUs are measured (ResNet-18, ResNet-50, MobileNetV2, MiniLM), TensorRT's are as it
documents them:

- onnxruntime fuses a convolution only between quantised tensors, unsigned, and an add likewise
  (QLinearAdd); its integer Gemm gives floats. No runtime of a CPU gets integer transposed
  convolutions.
- OpenVINO reads the same form. Its convolutions also give floats, compute an add and SiLU: without
  the quantizers between, EfficientNet-B0 takes 14.5 ms instead of 18.4, at 0.7 dB more.
- ExecuTorch's XNNPACK delegate wants signed activations and a quantised output of every
  convolution and linear layer, the last ones included: without it the numbers are silently wrong.
- Inductor's x86 kernels are convolutions of one and two dimensions and linear layers, with one
  scale per output channel and unsigned activations; they too give floats, and compute an add and
  SiLU (EfficientNet-B0: 15.0 ms instead of 16.6).
- TensorRT wants symmetric, signed activations. Quantizers stand before what multiplies, not after;
  an add after a convolution is computed by it, its other operand quantised ("Working with
  Quantized Types" in its developer guide).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, Literal

from passes.quantize._rules import (
    ACTIVATIONS,
    AVERAGES,
    COMBINES,
    CONVOLUTIONS,
    FUSED,
    LAYERS,
    MOVES,
)

__all__ = ["TARGETS", "Granularity", "Numbers", "PlacementRules", "Target", "for_floats"]

Target = Literal["generic", "onnxruntime", "openvino", "executorch", "inductor", "tensorrt-qdq"]
Granularity = Literal["channel", "tensor"]
Numbers = Literal["int", "float8_e4m3", "float8_e5m2"]

_ANY_WIDTH: Final = tuple(range(2, 17))
_TRANSPOSED: Final = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
_PLAIN: Final = CONVOLUTIONS - _TRANSPOSED
_POOLS: Final = AVERAGES - {"mean"}


@dataclass(frozen=True)
class PlacementRules:
    """Where a runtime wants quantizers, and the integers that its kernels take.

    Attributes:
        name: The target.
        layers: Convolutions and linear layers with an integer kernel.
        results: Ops whose result, after a fused activation, is quantised for everybody who reads
            it. What another kernel gives is quantised only for the kernels that read it.
        unread_results: Whether such a result is quantised even if no kernel reads it.
        combines: Integer kernels of several activations.
        fused_adds: A convolution computes an add too, if its result goes there and nowhere else:
            only the add's other operand is quantised. Other adds are kernels of their own where
            `results` has them.
        averages: Integer kernels of one activation whose result has a scale of its own.
        moves: Ops that take integers as they are and pass their scale on.
        fused: Activations that are part of the kernel before them.
        functions: Element-wise float functions of an integer tensor whose result an integer kernel
            may combine with others.
        gates: SiLU between integers is an integer σ, with the scale 1/256, and an integer product.
        products: Whether there are integer products of two activations.
        dtypes: Integers, and the 8-bit floats that it takes.
        quantizer: The op that rounds activations.
        weight_bits: Widths of weights.
        weight_per: Granularity of weights.
        activation_bits: Widths of activations.
        signed: Signed activations or not; None where both do.
        symmetric: Symmetric activations or not; None where both do.
    """

    name: Target
    layers: frozenset[str] = LAYERS
    results: frozenset[str] = CONVOLUTIONS | COMBINES | AVERAGES
    unread_results: bool = True
    combines: frozenset[str] = COMBINES
    fused_adds: bool = False
    averages: frozenset[str] = AVERAGES
    moves: frozenset[str] = MOVES
    fused: frozenset[str] = FUSED
    functions: frozenset[str] = ACTIVATIONS
    gates: bool = False
    products: bool = True
    dtypes: tuple[Numbers, ...] = ("int",)
    quantizer: str = "fake_quant"
    weight_bits: tuple[int, ...] = (8,)
    weight_per: tuple[Granularity, ...] = ("channel", "tensor")
    activation_bits: tuple[int, ...] = (8,)
    signed: bool | None = None
    symmetric: bool | None = None


_ROWS: Final = (
    PlacementRules(
        "generic",
        dtypes=("int", "float8_e4m3", "float8_e5m2"),
        weight_bits=_ANY_WIDTH,
        activation_bits=_ANY_WIDTH,
    ),
    PlacementRules("onnxruntime", layers=_PLAIN | {"linear"}, gates=True, signed=False),
    PlacementRules(
        "openvino",
        layers=_PLAIN | {"linear"},
        unread_results=False,
        fused_adds=True,
        fused=FUSED | {"silu", "hardswish"},
    ),
    PlacementRules(
        "executorch",
        layers=frozenset({"conv1d", "conv2d", "linear"}),
        results=LAYERS | COMBINES | AVERAGES,
        products=False,
        signed=True,
    ),
    PlacementRules(
        "inductor",
        layers=frozenset({"conv1d", "conv2d", "linear"}),
        results=CONVOLUTIONS | {"add", "cat"} | _POOLS,
        unread_results=False,
        combines=frozenset({"add", "cat"}),
        fused_adds=True,
        averages=_POOLS,
        fused=FUSED | {"silu", "hardswish"},
        products=False,
        weight_per=("channel",),
        signed=False,
    ),
    PlacementRules(
        "tensorrt-qdq",
        results=frozenset(),
        combines=frozenset({"add"}),
        fused_adds=True,
        averages=frozenset(),
        moves=frozenset(),
        functions=frozenset(),
        dtypes=("int", "float8_e4m3"),
        signed=True,
        symmetric=True,
    ),
)

TARGETS: Final = MappingProxyType({rules.name: rules for rules in _ROWS})


def for_floats(rules: PlacementRules) -> PlacementRules:
    """Return the rules for 8-bit floats: what multiplies reads them, and nothing else does."""
    none: frozenset[str] = frozenset()
    return replace(
        rules,
        results=none,
        combines=none,
        fused_adds=False,
        averages=none,
        functions=none,
        gates=False,
        quantizer="float_quant",
    )
