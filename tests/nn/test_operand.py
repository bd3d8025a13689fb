import pytest
import torch
from torch import nn

from fxcompress.errors import UsageError
from fxcompress.nn import take_weight_as_operand

LAYERS = [
    (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
    (nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), (2, 4, 9, 9)),
    (nn.Conv3d(2, 3, 2, bias=False), (2, 2, 4, 4, 4)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5)),
    (nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2), (2, 4, 5, 5)),
    (nn.ConvTranspose3d(2, 3, 2, stride=2, padding=1), (2, 2, 3, 3, 3)),
    (nn.Linear(4, 6), (2, 3, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: type(v).__name__)
def test_computes_what_the_layer_computes(layer, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    operand = take_weight_as_operand(layer)
    assert torch.equal(operand(x, layer.weight), layer(x))
    assert torch.equal(operand(x, 2 * layer.weight) - operand(x, layer.weight) * 2,
                       operand(x, 2 * layer.weight) - layer(x) * 2)  # fmt: skip


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: type(v).__name__)
def test_shares_parameters_and_settings_but_no_tables(layer, shape):
    operand = take_weight_as_operand(layer)
    assert operand.weight is layer.weight
    assert operand.extra_repr() == layer.extra_repr()
    assert isinstance(operand, type(layer))
    operand.register_parameter("bias", None)
    assert layer.bias is not None or type(layer) is nn.Conv3d


def test_a_layer_without_operand_form_is_refused():
    with pytest.raises(UsageError, match="LayerNorm cannot take its weight"):
        take_weight_as_operand(nn.LayerNorm(3))
