"""Early exits in emitted files: equal to the Program, and nothing is computed after the exit."""

from functools import cache

import pytest
import torch
from torch import nn

from fxcompress.emit import eager_module
from fxcompress.emit._branches import write_branches
from fxcompress.emit._export import export_program
from fxcompress.emit._plain import plain_program
from fxcompress.emit._probes import probes
from fxcompress.ir import capture
from fxcompress.nn import Exit
from fxcompress.rewrite import GraphRewriter


class Chain(nn.Module):
    """Three layers, each followed by a head; the last size is read from an inner tensor."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(6, 4) for _ in range(3))

    def forward(self, x):
        answers = []
        for layer, head in zip(self.layers, self.heads, strict=True):
            x = torch.relu(layer(x)).reshape(x.shape[0], 2, 3).flatten(1)
            answers.append(head(x))
        return tuple(answers)


@cache
def chained(low=0.93, high=0.95):
    torch.manual_seed(0)
    program = capture(Chain().eval(), (torch.randn(4, 6),))
    rewriter = GraphRewriter(program)
    (output,) = rewriter.graph.find_nodes(op="output")
    first, second, last = output.args[0]
    value = rewriter.call_module("b", Exit("exit_1", high), (second, last), before=output)
    value = rewriter.call_module("a", Exit("exit_0", low), (first, value), before=output)
    rewriter.set_args(output, ((value, value, value),))
    return rewriter.finish()


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_branches_give_the_same_answers(rows):
    module = eager_module(chained())
    torch.manual_seed(rows)
    for _ in range(4):
        x = torch.randn(rows, 6)
        for got, wanted in zip(module(x), chained()(x), strict=True):
            assert torch.equal(got, wanted)


def test_what_comes_after_an_exit_is_not_computed():
    program = chained(2.0, 2.0)
    plain = plain_program(program)
    write_branches(plain.module)
    # All samples are sure at once: only the first layer and its head are outside a branch.
    names = {str(node.target) for node in plain.module.graph.nodes if node.op == "call_module"}
    assert names == {"layers.0", "heads.0", "a_branch"}
    inner = plain.module.a_branch.later
    assert {str(n.target) for n in inner.graph.nodes if n.op == "call_module"} == {
        "layers.1", "heads.1", "b_branch",
    }  # fmt: skip


def test_exported_programs_branch_and_skip_the_rest():
    program = chained()
    plain = plain_program(program)
    example = probes(program, None, 0, program.dims)[0]
    exported = export_program(plain, program.dims, example, branches=True)
    assert "2 early exits are branches" in exported.notes[-1]
    module = exported.program.module()
    ops = [str(node.target) for node in exported.program.graph.nodes]
    assert ops.count("cond") == 1
    assert sum("linear" in op for op in ops) == 2
    for rows in (1, 3, 9):
        x = torch.randn(rows, 6)
        torch.testing.assert_close(module(x), tuple(chained()(x)))


def test_a_graph_without_exits_is_left_alone():
    torch.manual_seed(0)
    plain = plain_program(capture(Chain().eval(), (torch.randn(4, 6),)))
    before = str(plain.module.graph)
    assert write_branches(plain.module) == 0
    assert str(plain.module.graph) == before
