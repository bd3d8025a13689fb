"""Fused attention written out: the same outputs and gradients, whatever its arguments."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxcompress.errors import PassError
from fxcompress.ir import capture
from fxcompress.nn import Tap
from fxcompress.rewrite import GraphRewriter, Put, put_taps, taps_of, without_taps
from fxcompress.rewrite.attention import attentions, open_attention
from fxcompress.rewrite.closing import as_emitted


class Attention(nn.Module):
    """Four query heads of width 4; keys and values have two where they are shared."""

    def __init__(self, dropout=0.0, **options):
        super().__init__()
        inner = 8 if options.get("enable_gqa") else 16
        self.q, self.k, self.v = nn.Linear(8, 16), nn.Linear(8, inner), nn.Linear(8, inner)
        self.options, self.dropout = options, dropout

    def forward(self, x, mask=None):
        q, k, v = (m(x).unflatten(-1, (-1, 4)).transpose(1, 2) for m in (self.q, self.k, self.v))
        p = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, **self.options)
        return mixed.transpose(1, 2).flatten(2)


def masks():
    generator = torch.Generator().manual_seed(1)
    seen = torch.rand(2, 1, 5, 5, generator=generator) > 0.4
    seen[0, 0, 2] = False  # a place that sees nothing
    added = torch.randn(2, 1, 5, 5, generator=generator)
    added[1, 0, 1], added[0, 0, 0, 2] = float("-inf"), float("-inf")
    return {"none": None, "bool": seen, "float": added, "heads": seen.expand(2, 4, 5, 5).clone()}


def opened(program):
    rewriter = GraphRewriter(program)
    (site,) = attentions(rewriter.graph.nodes)
    assert site.probabilities is None
    open_attention(rewriter, site.node)
    result = rewriter.finish()
    result.verify()
    return result


def captured(mask=None, **options):
    torch.manual_seed(0)
    args = (torch.randn(2, 5, 8),) if mask is None else (torch.randn(2, 5, 8), mask)
    dynamic = {"x": {0: "batch", 1: "seq"}, "mask": {0: "batch", 2: "seq", 3: "seq"}}
    known = {name: dynamic[name] for name, _ in zip(dynamic, args, strict=False)}
    return capture(Attention(**options).eval(), args, dynamic=known, verify=False), args


def outputs_and_gradients(program, args):
    x = args[0].clone().requires_grad_()
    program.module.zero_grad()
    out = program(x, *args[1:])
    out.square().sum().backward()
    found = [out.detach(), x.grad]
    return found + [p.grad.clone() for _, p in sorted(program.module.named_parameters())]


@pytest.mark.parametrize("mask", ["none", "bool", "float", "heads"])
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"enable_gqa": True}], ids=str)
def test_outputs_and_gradients_are_equal(mask, options):
    program, args = captured(masks()[mask], **options)
    pairs = zip(
        outputs_and_gradients(program, args),
        outputs_and_gradients(opened(program), args),
        strict=True,
    )
    differences = [(float((a - b).abs().max()), float(a.abs().max())) for a, b in pairs]
    # The gradient of a key's bias is 0 but for rounding: the largest one is the measure.
    largest = max(size for _, size in differences[1:])
    assert differences[0][0] <= 1e-6 * differences[0][1]
    assert all(difference <= 1e-6 * largest for difference, _ in differences[1:])


def test_a_causal_one():
    program, args = captured(is_causal=True)
    after = opened(program)
    for a, b in zip(
        outputs_and_gradients(program, args), outputs_and_gradients(after, args), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-6)
    longer = (torch.randn(3, 9, 8),)
    assert torch.allclose(program(*longer), after(*longer), atol=1e-6)


def test_dropout_acts_in_training_alone():
    program, args = captured(dropout=0.5)
    after = opened(program)
    assert "training_switch" not in after.text()
    assert torch.allclose(program(*args), after(*args), atol=1e-6)
    after.module.train()
    torch.manual_seed(0)
    first, second = after(*args), after(*args)
    assert not torch.equal(first, second)
    after.module.eval()


def test_what_is_written_out_is_found_again():
    program, _ = captured(masks()["bool"], enable_gqa=True)
    (site,) = attentions(opened(program).nodes)
    assert site.probabilities is not None
    shapes = [tuple(n.meta["val"].shape[i] for i in (1, 3)) for n in (site.query, site.key)]
    assert shapes == [(4, 4), (4, 4)]
    assert str(site.probabilities.meta["val"].shape[1]) == "4"


def test_a_flag_that_the_graph_computes_is_refused():
    class Odd(nn.Module):
        def forward(self, q, k):
            return F.scaled_dot_product_attention(q, k, k, enable_gqa=True)

    program = capture(Odd(), (torch.randn(2, 4, 5, 4), torch.randn(2, 2, 5, 4)))
    rewriter = GraphRewriter(program)
    (site,) = attentions(rewriter.graph.nodes)
    site.node.kwargs = {**site.node.kwargs, "is_causal": site.node.args[0]}
    with pytest.raises(PassError, match="cannot be written out"):
        open_attention(rewriter, site.node)


def tapped(program, *, opened=True):
    rewriter = GraphRewriter(program)
    (site,) = attentions(rewriter.graph.nodes)
    put_taps(rewriter, [Put(Tap("p", opened=opened), rewriter.id(site.node), fused=True)])
    return rewriter.finish()


@pytest.mark.parametrize("mask", ["none", "bool", "float", "heads", "causal"])
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"dropout": 0.5}], ids=str)
def test_what_a_tap_opened_is_closed_when_it_goes(mask, options):
    causal = {"is_causal": True} if mask == "causal" else {}
    program, args = captured(masks().get(mask), **options, **causal)
    closed = as_emitted(tapped(program))
    closed.verify()
    assert closed.text(state=False).count("= sdpa(") == 1
    assert "softmax" not in closed.text(state=False)
    assert len(closed.nodes) <= len(program.nodes)
    assert torch.equal(closed(*args), program(*args))


def test_shared_keys_stay_repeated_and_a_longer_sequence_works():
    program, _ = captured(enable_gqa=True, is_causal=True)
    closed = as_emitted(tapped(program))
    assert "= sdpa(" in closed.text(state=False)
    longer = (torch.randn(3, 9, 8),)
    assert torch.allclose(closed(*longer), program(*longer), atol=1e-6)


def test_what_was_written_out_before_or_changed_since_stays():
    program, _ = captured(masks()["bool"])
    own = tapped(program, opened=False)
    assert as_emitted(own).text() == without_taps(own).text()
    rewriter = GraphRewriter(tapped(program))
    (tap,) = taps_of(rewriter.program).values()
    shares = tap.all_input_nodes[0]
    (mixed,) = (user for user in shares.users if user is not tap)
    clipped = rewriter.call_function(torch.relu, (shares,), after=shares)
    rewriter.set_args(mixed, (clipped, mixed.args[1]))
    assert "softmax" in as_emitted(rewriter.finish()).text(state=False)
    assert as_emitted(program) is program
