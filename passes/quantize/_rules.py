"""Families of ops: which multiply, combine, average, move values, or act element-wise.

What each target makes of them is in `_targets`. A convolution with bias and ReLU is one kernel
everywhere, so its output is quantised after the ReLU; max pooling and reshapes take integers as
they are.
"""

from typing import Final

__all__ = [
    "ACTIVATIONS",
    "AVERAGES",
    "COMBINES",
    "CONVOLUTIONS",
    "FUSED",
    "IDLE",
    "LAYERS",
    "MOVES",
    "PRODUCTS",
    "SPLITS",
]

CONVOLUTIONS: Final = frozenset(
    {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
)
# Layers with a weight.
LAYERS: Final = CONVOLUTIONS | {"linear"}

# Clamping activations are part of the kernel before them: the integer range does the clamping.
FUSED: Final = frozenset({"relu", "relu6", "hardtanh", "clamp"})

# Integer kernels of several activations, when all of them are quantised.
COMBINES: Final = frozenset({"add", "mul", "cat"})

# Integer kernels of one activation that computes new values, so the result has its own scale.
AVERAGES: Final = frozenset(
    {
        "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
        "adaptive_avg_pool3d", "mean",
    }
)  # fmt: skip

# Every value of the result is a value of the operand: its scale passes through.
MOVES: Final = frozenset(
    {
        "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
        "adaptive_max_pool3d", "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze",
        "transpose", "t", "permute", "movedim", "contiguous", "clone", "identity", "expand",
        "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "slice", "select", "narrow",
        "dropout", "dropout1d", "dropout2d", "dropout3d", "stochastic_depth", "roll",
        "flip", "getitem",
    }
)  # fmt: skip

# Outside training they do nothing.
IDLE: Final = frozenset(
    {"dropout", "dropout1d", "dropout2d", "dropout3d", "identity", "stochastic_depth"}
)

# Moves with several results, each a `getitem`; a tuple cannot be quantised, its items are.
SPLITS: Final = frozenset({"chunk", "split", "tensor_split", "unbind"})

# Element-wise ops in float whose result an integer kernel may read next.
ACTIVATIONS: Final = frozenset(
    {
        "relu", "relu6", "hardtanh", "clamp", "leaky_relu", "elu", "selu", "celu", "gelu", "silu",
        "mish", "sigmoid", "tanh", "hardsigmoid", "hardswish", "softplus", "softsign", "prelu",
        "interpolate",
    }
)  # fmt: skip

# Products of two activations; in float unless asked for.
PRODUCTS: Final = frozenset({"matmul", "mm", "bmm", "sdpa", "einsum", "baddbmm"})
