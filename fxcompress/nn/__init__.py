"""The few runtime modules that a rewritten graph may hold, beside those of `torch.nn`.

Every constructor argument of a module here is an attribute of the same name, so that a module can
be described as data and built again from it.
"""

from typing import TYPE_CHECKING

from fxcompress._lazy import lazy_exports

if TYPE_CHECKING:
    from fxcompress.nn.binarize import Binarize as Binarize
    from fxcompress.nn.codebook import Codebook as Codebook
    from fxcompress.nn.dynamic_quantize import DynamicQuantize as DynamicQuantize
    from fxcompress.nn.exits import Exit as Exit
    from fxcompress.nn.experts import Experts as Experts
    from fxcompress.nn.fake_quantize import FakeQuantize as FakeQuantize
    from fxcompress.nn.fake_quantize import affine_parameters as affine_parameters
    from fxcompress.nn.float_quantize import FloatQuantize as FloatQuantize
    from fxcompress.nn.mask import Mask as Mask
    from fxcompress.nn.operand import OperandConv1d as OperandConv1d
    from fxcompress.nn.operand import OperandConv2d as OperandConv2d
    from fxcompress.nn.operand import OperandConv3d as OperandConv3d
    from fxcompress.nn.operand import OperandConvTranspose1d as OperandConvTranspose1d
    from fxcompress.nn.operand import OperandConvTranspose2d as OperandConvTranspose2d
    from fxcompress.nn.operand import OperandConvTranspose3d as OperandConvTranspose3d
    from fxcompress.nn.operand import OperandEmbedding as OperandEmbedding
    from fxcompress.nn.operand import OperandLinear as OperandLinear
    from fxcompress.nn.operand import own_weight as own_weight
    from fxcompress.nn.operand import take_weight_as_operand as take_weight_as_operand
    from fxcompress.nn.operand_experts import OperandExperts as OperandExperts
    from fxcompress.nn.recurrent import OperandGRU as OperandGRU
    from fxcompress.nn.recurrent import OperandLSTM as OperandLSTM
    from fxcompress.nn.recurrent import OperandRNN as OperandRNN
    from fxcompress.nn.recurrent import take_weights_as_operands as take_weights_as_operands
    from fxcompress.nn.routing import RouteGradient as RouteGradient
    from fxcompress.nn.routing import TopTokens as TopTokens
    from fxcompress.nn.stack_quantize import StackQuantize as StackQuantize
    from fxcompress.nn.stochastic import LayerDrop as LayerDrop
    from fxcompress.nn.stochastic import StochasticDepth as StochasticDepth
    from fxcompress.nn.stochastic import TrainingSwitch as TrainingSwitch
    from fxcompress.nn.tap import Tap as Tap

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Binarize": "binarize",
        "Codebook": "codebook",
        "DynamicQuantize": "dynamic_quantize",
        "Experts": "experts",
        "Exit": "exits",
        "FakeQuantize": "fake_quantize",
        "FloatQuantize": "float_quantize",
        "LayerDrop": "stochastic",
        "Mask": "mask",
        "OperandConv1d": "operand",
        "OperandConv2d": "operand",
        "OperandConv3d": "operand",
        "OperandConvTranspose1d": "operand",
        "OperandConvTranspose2d": "operand",
        "OperandConvTranspose3d": "operand",
        "OperandEmbedding": "operand",
        "OperandExperts": "operand_experts",
        "OperandGRU": "recurrent",
        "OperandLSTM": "recurrent",
        "OperandLinear": "operand",
        "OperandRNN": "recurrent",
        "StackQuantize": "stack_quantize",
        "StochasticDepth": "stochastic",
        "Tap": "tap",
        "RouteGradient": "routing",
        "TopTokens": "routing",
        "TrainingSwitch": "stochastic",
        "affine_parameters": "fake_quantize",
        "own_weight": "operand",
        "take_weight_as_operand": "operand",
        "take_weights_as_operands": "recurrent",
    },
)
