import pytest
import torch
from torch import nn

from fxcompress.errors import PassError
from fxcompress.ir import capture
from fxcompress.ir.ops import op_name
from fxcompress.nn import Mask, take_weight_as_operand
from fxcompress.rewrite import GraphRewriter, burn_masks, masked_tensors, without_masks


class Two(nn.Module):
    def __init__(self, *, tied=False):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        if tied:
            self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x).relu())


def two(*, tied=False):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return capture(Two(tied=tied).eval(), (torch.randn(2, 4),))


def with_mask(program, *layers):
    rewriter = GraphRewriter(program)
    first = rewriter.node(layers[0])
    weight = rewriter.get_attr(f"{layers[0]}.weight", before=first)
    module = Mask((4, 4))
    module.mask = torch.eye(4, dtype=torch.bool)
    mask = rewriter.call_module("mask", module, (weight,), after=weight)
    for layer in layers:
        rewriter.set_module(layer, take_weight_as_operand(rewriter.get_module(layer)))
        rewriter.set_args(rewriter.node(layer), (rewriter.node(layer).args[0], mask), {})
    return rewriter.finish()


@pytest.mark.parametrize("layers", [("a",), ("a", "b")])
def test_burning_in_leaves_stock_layers_and_the_same_bits(layers):
    program = with_mask(two(tied=len(layers) == 2), *layers)
    assert masked_tensors(program) == {"mask": "a.weight"}
    burned = without_masks(program)
    x = torch.randn(5, 4)
    assert torch.equal(program(x), burned(x))
    assert [op_name(n) for n in burned.nodes] == ["input", "linear", "relu", "linear", "output"]
    assert type(burned.module.get_submodule("a")) is nn.Linear
    assert int(burned.state()["a.weight"].count_nonzero()) == 4
    assert burned.ties == program.ties
    assert without_masks(burned) is burned


def test_a_weight_that_is_read_past_its_mask_is_refused():
    program = with_mask(two(tied=True), "a")
    with pytest.raises(PassError, match=r"cannot be burned into a\.weight") as caught:
        without_masks(program)
    assert caught.value.reason == "b reads the tensor without the mask"


def test_only_some_masks_are_burned_in():
    program = with_mask(two(), "a")
    rewriter = GraphRewriter(program)
    assert burn_masks(rewriter, []) == {}
    assert rewriter.finish().fingerprint() == program.fingerprint()


def test_a_mask_of_an_activation_is_no_weight():
    rewriter = GraphRewriter(two())
    relu = rewriter.node("/relu")
    mask = rewriter.call_module("mask", Mask((4,)), (relu,), after=relu)
    rewriter.replace_uses(relu, mask)
    with pytest.raises(PassError, match="the mask mask is not on a weight"):
        masked_tensors(rewriter.finish())
