"""From fake-quantize nodes to integers: one lowering, a table of what each runtime wants."""

from fxcompress.emit._lower.graph import (
    activation_bits,
    is_quantized,
    is_weight,
    quantizer_of,
    register_decomposed,
    tensor_at,
)
from fxcompress.emit._lower.layer import layer_call
from fxcompress.emit._lower.lower import Form, lower
from fxcompress.emit._lower.stored import Lowered
from fxcompress.emit._lower.targets import (
    EXECUTORCH,
    INDUCTOR,
    ONNXRUNTIME,
    OPENVINO,
    PT2E,
    TENSORRT,
    Target,
)

__all__ = [
    "EXECUTORCH",
    "INDUCTOR",
    "ONNXRUNTIME",
    "OPENVINO",
    "PT2E",
    "TENSORRT",
    "Form",
    "Lowered",
    "Target",
    "activation_bits",
    "is_quantized",
    "is_weight",
    "layer_call",
    "lower",
    "quantizer_of",
    "register_decomposed",
    "tensor_at",
]
