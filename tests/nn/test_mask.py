import pytest
import torch
from torch import nn

from fxcompress.errors import UsageError
from fxcompress.ir import describe
from fxcompress.nn import Mask, OperandLinear, own_weight, take_weight_as_operand


def masked(*shape, dtype=torch.float32):
    mask = Mask(shape)
    mask.mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return mask, x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_masks_with_positive_zeros_in_the_operands_type(dtype):
    mask, x = masked(3, 4, dtype=dtype)
    x[0, 0], x[0, 1] = float("inf"), -1.0
    mask.mask[0, :2] = False
    y = mask(x)
    assert y.dtype == dtype
    assert torch.equal(y[mask.mask], x[mask.mask])
    assert bool((y[~mask.mask] == 0).all())
    assert not bool(torch.signbit(y[~mask.mask]).any())


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    ],
)
def test_no_optimiser_moves_zeros_under_a_mask(optimizer):
    mask, x = masked(5, 6)
    weight = nn.Parameter(x * mask.mask)
    step = optimizer([weight])
    for _ in range(3):
        step.zero_grad()
        (mask(weight).square().sum() + mask(weight).sum()).backward()
        assert not bool(weight.grad[~mask.mask].any())
        assert bool(weight.grad[mask.mask].all())
        step.step()
    assert not bool(weight.detach()[~mask.mask].any())
    assert not torch.equal(weight.detach(), x * mask.mask)


def test_is_described_by_its_shape_as_it_is_now():
    mask = Mask((2, 3))
    mask.mask = torch.ones(2, 2, dtype=torch.bool)
    config = describe(mask)
    assert dict(config.kwargs) == {"shape": (2, 2)}
    assert config.build("cpu").mask.shape == (2, 2)


def test_a_layer_gets_its_weight_back():
    layer = nn.Linear(3, 2)
    back = own_weight(take_weight_as_operand(layer))
    assert type(back) is nn.Linear
    assert back.weight is layer.weight
    with pytest.raises(UsageError, match="Linear does not take its weight as an operand"):
        own_weight(nn.Linear(3, 2))
    assert isinstance(take_weight_as_operand(layer), OperandLinear)
