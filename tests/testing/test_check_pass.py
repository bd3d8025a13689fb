from typing import ClassVar

import pytest
import torch
from torch import nn

from fxcompress.ir import Program, node_ids, op_name
from fxcompress.pipeline.base import Decision, Options, Pass
from fxcompress.testing import check_pass
from tests.ir.small_models import small_cnn


class NoOptions(Options):
    """None."""


class Found(Decision):
    nodes: tuple[str, ...] = ()


class ReluTwice(Pass[NoOptions, Found]):
    """Replace relu(x) by relu(relu(x)), which is the same."""

    Options: ClassVar = NoOptions
    Decision: ClassVar = Found
    preserves: ClassVar = "exact"
    target: ClassVar = staticmethod(torch.relu)

    def decide(self, program, options, context):
        ids = node_ids(program)
        return Found(
            nodes=tuple(
                ids[n]
                for n in program.nodes
                if op_name(n) == "relu"
                and n.op == "call_function"
                and all(op_name(user) != self.again for user in n.users)
                and op_name(n.args[0]) != self.again
            )
        )

    again = "clamp_min"

    def rewrite(self, rewriter, decision):
        for name in decision.nodes:
            node = rewriter.node(name)
            new = rewriter.call_function(torch.clamp_min, (node, 0), after=node)
            rewriter.replace_uses(node, new, only=lambda user, new=new: user is not new)


class Endless(ReluTwice):
    again = "never"


class Wrong(ReluTwice):
    def rewrite(self, rewriter, decision):
        for name in decision.nodes:
            node = rewriter.node(name)
            new = rewriter.call_function(torch.neg, (node,), after=node)
            rewriter.replace_uses(node, new, only=lambda user, new=new: user is not new)


class Mutating(ReluTwice):
    def decide(self, program: Program, options, context):
        with torch.no_grad():
            program.module.fc.weight.zero_()
        return super().decide(program, options, context)


class NotBlocked(Options):
    """None."""


def test_an_honest_pass():
    result = check_pass(ReluTwice, small_cnn())
    assert result.kinds()["add-node"] == 4
    assert "clamp_min(%layers.0/relu, 0)" in result.graph
    assert result.reasons() == {}


def test_number_of_edits():
    with pytest.raises(AssertionError, match="edits, not 1"):
        check_pass(ReluTwice, small_cnn(), edits=1)


@pytest.mark.parametrize(
    ("pass_", "problem"),
    [
        (Endless, "second application made"),
        (Wrong, "not equivalent"),
        (Mutating, "changed the Program it was given"),
    ],
)
def test_broken_promises(pass_, problem):
    with pytest.raises(AssertionError, match=problem):
        check_pass(pass_, small_cnn())


def test_a_case_that_must_not_match():
    class Plain(nn.Module):
        def forward(self, x):
            return x + 1

    from fxcompress.ir import capture

    check_pass(ReluTwice, capture(Plain(), (torch.ones(2, 3),)), edits=0)
