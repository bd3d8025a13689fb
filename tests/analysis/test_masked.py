"""The masked reference: what is removed is held at zero, and statistics are of what is kept."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.analysis import MaskedReference, masked_difference
from fxcompress.axes import analyze
from fxcompress.ir import capture
from fxcompress.rewrite import GraphRewriter
from fxcompress.rewrite.shrink import shrink
from tests.axes.support import Keep, Net, captured, pruned

KEPT = np.array([0, 2, 3])


def _of(compute: Any, width: int = 5, **parts: Any) -> tuple[Any, Any, Keep, list[Tensor]]:
    """Return a Program, its analysis, a choice for its first axis, and an input."""
    torch.manual_seed(0)
    net = Net(
        lambda m, x: m.down(compute(m, m.up(x))),
        up=nn.Linear(4, width), down=nn.Linear(width, 3), **parts,
    )  # fmt: skip
    x = torch.randn(2, 7, 4)
    program = captured((net, (x,)))
    analysis = analyze(program)
    return program, analysis, {analysis.axis("up.weight[0]"): KEPT}, [x]


def test_without_a_choice_it_is_the_original() -> None:
    program, analysis, _, leaves = _of(lambda m, x: x.softmax(-1))
    (found,) = MaskedReference(analysis, {}).outputs(leaves)
    assert torch.equal(found, program.module(*leaves))


def test_it_is_the_original_with_the_units_removed_by_hand() -> None:
    program, analysis, keep, leaves = _of(lambda m, x: torch.sigmoid(x))
    (found,) = MaskedReference(analysis, keep).outputs(leaves)
    state = program.state()
    hidden = torch.sigmoid(F.linear(leaves[0], state["up.weight"], state["up.bias"]))
    hidden[..., [1, 4]] = 0  # after the sigmoid, whose value at zero is no zero
    wanted = F.linear(hidden, state["down.weight"], state["down.bias"])
    assert torch.allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("norm", [nn.LayerNorm(5), nn.RMSNorm(5), nn.LayerNorm(5, bias=False)])
def test_norms_are_of_what_is_kept(norm: nn.Module) -> None:
    program, analysis, keep, leaves = _of(lambda m, x: m.norm(x), norm=norm)
    (found,) = MaskedReference(analysis, keep).outputs(leaves)
    state = program.state()
    hidden = F.linear(leaves[0], state["up.weight"], state["up.bias"])[..., KEPT]
    gain = state["norm.weight"][KEPT]
    if isinstance(norm, nn.RMSNorm):
        normed = F.rms_norm(hidden, (3,), gain)
    else:
        bias = state["norm.bias"][KEPT] if "norm.bias" in state else None
        normed = F.layer_norm(hidden, (3,), gain, bias)
    wanted = F.linear(normed, state["down.weight"][:, KEPT], state["down.bias"])
    assert torch.allclose(found, wanted, atol=1e-5)


def test_shares_are_among_what_is_kept() -> None:
    _, analysis, keep, leaves = _of(lambda m, x: x.softmax(-1))
    reference = MaskedReference(analysis, keep)
    seen: dict[str, Tensor] = {}
    run = reference.run_node

    def keep_result(node: Any) -> Any:
        seen[node.name] = run(node)
        return seen[node.name]

    reference.run_node = keep_result  # type: ignore[method-assign]
    reference.outputs(leaves)
    shares = seen["softmax"]
    assert torch.allclose(shares.sum(-1), torch.ones(2, 7))
    assert bool((shares[..., [1, 4]] == 0).all())
    assert bool((shares[..., KEPT] > 0).all())


def test_a_removed_hidden_unit_feeds_no_step() -> None:
    torch.manual_seed(0)
    net = Net(lambda m, x: m.down(m.rnn(x)[0]), rnn=nn.LSTM(4, 5, batch_first=True),
              down=nn.Linear(5, 3))  # fmt: skip
    x = torch.randn(2, 7, 4)
    program = captured((net, (x,)))
    analysis = analyze(program)
    (axis,) = analysis.axes
    (found,) = MaskedReference(analysis, {axis: KEPT}).outputs([x])
    rows = np.concatenate([KEPT + 5 * gate for gate in range(4)])
    small = nn.LSTM(4, 3, batch_first=True)
    state = program.state()
    with torch.no_grad():
        for name, tensor in small.named_parameters():
            value = state[f"rnn.{name}"][rows]
            tensor.copy_(value[:, KEPT] if name == "weight_hh_l0" else value)
        wanted = F.linear(small(x)[0], state["down.weight"][:, KEPT], state["down.bias"])
    assert torch.allclose(found, wanted, atol=1e-6)


def test_the_difference_is_in_standard_deviations_of_the_output() -> None:
    program, analysis, keep, leaves = _of(lambda m, x: torch.relu(x))
    after = pruned(program, analysis, keep)
    assert masked_difference(analysis, keep, after, leaves) < 1e-6
    (wanted,) = MaskedReference(analysis, keep).outputs(leaves)
    rewriter = GraphRewriter(after)
    rewriter.set_tensor("down.bias", after.state()["down.bias"] + 0.5)
    after = rewriter.finish()
    gap = masked_difference(analysis, keep, after, leaves)
    assert gap == pytest.approx(0.5 / float(wanted.double().std(correction=0)), rel=1e-4)


def test_a_removed_output_is_compared_by_what_is_left() -> None:
    torch.manual_seed(0)
    net = Net(lambda m, x: m.up(x), up=nn.Linear(4, 5))
    x = torch.randn(3, 4)
    program = captured((net, (x,)))
    analysis = analyze(program, signature="free")
    keep = {analysis.axis("up.weight[0]"): KEPT}
    after = pruned(program, analysis, keep)
    assert masked_difference(analysis, keep, after, [x]) < 1e-6
    assert masked_difference(analysis, {}, after, [x]) == math.inf  # the shapes differ


def test_an_output_that_is_not_finite_alone_is_caught() -> None:
    program, analysis, keep, leaves = _of(lambda m, x: torch.relu(x))
    after = pruned(program, analysis, keep)
    with torch.no_grad():
        after.state()["down.weight"][0, 0] = math.nan
    assert masked_difference(analysis, keep, after, leaves) == math.inf


class Registers(nn.Module):
    """Attention over tokens of which some are learned: both they and the width can go."""

    def __init__(self):
        super().__init__()
        self.registers = nn.Parameter(torch.randn(1, 4, 12))
        self.qkv, self.out = nn.Linear(12, 24), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.cat([self.registers.expand(x.shape[0], -1, -1), x], 1)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2).mean(1))


def test_attention_keeps_its_scale_where_tokens_and_width_go():
    torch.manual_seed(0)
    program = capture(Registers().eval(), (torch.randn(2, 5, 12),))
    analysis = analyze(program)
    keep = {axis: np.arange(0, axis.size, 2) for axis in analysis.axes}
    assert {axis.size for axis in keep} >= {2, 4}
    rewriter = GraphRewriter(program)
    shrink(rewriter, analysis, keep)
    after = rewriter.finish()
    leaves = program.signature.flatten((torch.randn(3, 5, 12),), {})
    assert masked_difference(analysis, keep, after, leaves) < 1e-5
