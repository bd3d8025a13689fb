"""Early exits in emitted files: equal to the Program, and nothing is computed after the exit."""

from functools import cache

import pytest
import torch
from torch import nn

from fxcompress.emit import eager_module
from fxcompress.emit._branches import write_branches
from fxcompress.emit._exit_forms import with_exits
from fxcompress.emit._export import export_program
from fxcompress.emit._plain import plain_program
from fxcompress.emit._probes import probes
from fxcompress.emit._rows import write_rows
from fxcompress.errors import EmitError
from fxcompress.ir import capture
from fxcompress.nn import Exit
from fxcompress.rewrite import GraphRewriter


class Chain(nn.Module):
    """Three layers, each followed by a head; the last size is read from an inner tensor."""

    def __init__(self, mixing: bool = False):
        super().__init__()
        self.mixing = mixing
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(6, 4) for _ in range(3))

    def forward(self, x):
        answers = []
        for layer, head in zip(self.layers, self.heads, strict=True):
            x = torch.relu(layer(x)).reshape(x.shape[0], 2, 3).flatten(1)
            x = x - x.mean(0) if self.mixing else x
            answers.append(head(x))
        return tuple(answers)


@cache
def chained(low=0.93, high=0.95, batch="each", mixing=False):
    torch.manual_seed(0)
    program = capture(Chain(mixing).eval(), (torch.randn(4, 6),))
    rewriter = GraphRewriter(program)
    (output,) = rewriter.graph.find_nodes(op="output")
    first, second, last = output.args[0]
    for name, threshold, early in (("exit_1", high, second), ("exit_0", low, first)):
        choice = Exit(name, threshold, batch=batch)
        last = rewriter.call_module(name, choice, (early, last), before=output)
    rewriter.set_args(output, ((last, last, last),))
    return rewriter.finish()


def example_of(program):
    return probes(program, None, 0, program.dims)[0]


def exported(program, *forms):
    """Return an exported program, its notes on exits, and all its ops, branches included."""
    plain = plain_program(program)
    made, notes = with_exits(
        plain, example_of(program), forms,
        lambda own: export_program(own, program.dims, example_of(program)),
    )  # fmt: skip
    graphs = [m for m in made.program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    ops = [[str(node.target) for node in each.graph.nodes] for each in graphs]
    return made.program.module(), notes, ops


@pytest.mark.parametrize("batch", ["each", "together"])
@pytest.mark.parametrize("thresholds", [(0.93, 0.95), (2.0, 0.0), (0.0, 0.0)])
def test_branches_give_the_same_answers(batch, thresholds):
    program = chained(*thresholds, batch=batch)
    module = eager_module(program)
    for rows in (1, 2, 16):
        torch.manual_seed(rows)
        x = torch.randn(rows, 6)
        for got, wanted in zip(module(x), program(x), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)


def test_what_comes_after_an_exit_runs_on_the_rest_alone():
    module, ran = eager_module(chained(0.93, 0.97)), []
    layers = [layer for name, layer in module.named_modules() if name.startswith("layers.")]
    hooks = [each.register_forward_hook(lambda m, x, y: ran.append(len(y))) for each in layers]
    module(torch.randn(64, 6, generator=torch.Generator().manual_seed(1)))
    for each in hooks:
        each.remove()
    assert ran[0] == 64 > ran[1] > ran[2] > 0


def test_what_comes_after_an_exit_is_not_computed():
    program = chained(2.0, 2.0)
    plain = plain_program(program)
    write_branches(plain.module)
    # All samples are sure at once: only the first layer and its head are outside a branch.
    names = {str(node.target) for node in plain.module.graph.nodes if node.op == "call_module"}
    assert names == {"layers.0", "heads.0", "exit_0_branch"}
    inner = plain.module.exit_0_branch.later
    assert {str(n.target) for n in inner.graph.nodes if n.op == "call_module"} == {
        "layers.1", "heads.1", "exit_1_branch",
    }  # fmt: skip


@pytest.mark.parametrize("form", ["rows", "branches", "together"])
def test_exported_programs_skip_what_is_not_needed(form):
    program = chained()
    module, notes, ops = exported(program, form)
    assert notes[-1].startswith("2 early exits")
    whole, *inner = ops
    assert whole.count("cond") == (form != "rows")
    assert sum("linear" in op for op in whole) == (6 if form == "rows" else 2)
    gathered = sum("index_select" in op for each in (whole, *inner) for op in each)
    assert gathered == (0 if form == "together" else 2)
    for rows in (1, 3, 9):
        x = torch.randn(rows, 6)
        torch.testing.assert_close(module(x), tuple(program(x)))


def test_samples_that_read_each_other_stop_together_and_the_note_says_why():
    program = chained(mixing=True)
    with pytest.raises(EmitError) as caught:
        eager_module(program)
    assert caught.value.reason == "it is computed from all samples of a batch at once"
    assert caught.value.hint == "use `batch: together` in `depth.exit_when`"
    assert caught.value.where == "/mean@2"
    _, notes, _ = exported(program, "rows", "together")
    assert notes[0] == "early exits are not written as rows: " + caught.value.reason
    assert "a batch stops at the first one" in notes[1]


class Stubborn(nn.Linear):
    """Takes no batch of none."""

    def forward(self, x):
        return super().forward(x).reshape(x.shape[0], -1)


def test_a_network_that_takes_no_batch_of_none_is_a_branch():
    program = chained(0.93, 0.95)
    plain = plain_program(program)
    stubborn = Stubborn(6, 6)
    plain.module.set_submodule("layers.2", stubborn)
    with pytest.raises(EmitError, match="does not run on a batch of none") as caught:
        write_rows(plain, example_of(program))
    assert "cannot reshape tensor of 0 elements" in caught.value.reason


def test_a_graph_without_exits_is_left_alone():
    torch.manual_seed(0)
    plain = plain_program(capture(Chain().eval(), (torch.randn(4, 6),)))
    before = str(plain.module.graph)
    assert write_branches(plain.module) == 0
    assert str(plain.module.graph) == before
