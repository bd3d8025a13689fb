import operator
from dataclasses import replace

import pytest
import torch
from torch import nn

from fxcompress.errors import VerifyError
from fxcompress.ir import Note, capture, find_node, propagate, verify, violations
from tests.ir.small_models import small_cnn, small_transformer


@pytest.fixture
def cnn():
    return small_cnn()


@pytest.fixture
def transformer():
    return small_transformer()


def invariants(program):
    return [violation.invariant for violation in violations(program)]


@pytest.mark.parametrize("build", [small_cnn, small_transformer])
def test_captured_programs_are_valid_and_so_are_copies(build):
    program = build()
    assert violations(program) == []
    assert violations(program.copy()) == []


def test_wrong_type_names_node_line_and_types(cnn):
    node = find_node(cnn, "layers.1/add")
    node.meta["val"] = find_node(cnn, "/mean").meta["val"]
    with pytest.raises(VerifyError) as raised:
        verify(cnn)
    text = str(raised.value)
    assert "%layers.1/add" in text
    assert "small_models.py:" in text
    assert "float32[" in text


def test_op_that_fails_on_its_operands(cnn):
    node = find_node(cnn, "fc")
    node.args = (find_node(cnn, "/mul"),)
    dead, wrong = violations(cnn)
    assert dead.about == "%/mean"
    assert "%fc does not work on its operands" in str(wrong)


def test_propagate_names_the_failing_node(cnn):
    node = find_node(cnn, "layers.0/add")
    node.args = (node.args[0], find_node(cnn, "x"))
    with pytest.raises(VerifyError, match=r"layers\.0/add does not work"):
        propagate(cnn)


def test_data_dependent_op_is_an_error(cnn):
    mean = find_node(cnn, "/mean")
    with cnn.graph.inserting_after(mean):
        item = cnn.graph.call_function(torch.nonzero, (mean,))
    with cnn.graph.inserting_after(item):
        shape = cnn.graph.call_method("tolist", (item,))
    with pytest.raises(VerifyError, match="tolist does not work"):
        propagate(cnn, [item, shape])


def test_fixed_dynamic_size_is_an_error_and_leaves_the_original_alone(transformer):
    broken = transformer.copy()
    node = find_node(broken, "layers.0.attention/reshape@2")
    node.args = (node.args[0], (3, *node.args[1][1:]))
    with pytest.raises(VerifyError, match="dynamic size 'batch' became"):
        propagate(broken)
    assert violations(transformer) == []


def test_partial_propagation_follows_users(cnn):
    cnn.module.fc = nn.Linear(16, 7)
    fc = find_node(cnn, "fc")
    propagate(cnn, [fc])
    assert fc.meta["val"].shape[1] == 7
    assert violations(cnn) == []


def test_sizes_that_depend_on_data_stay_apart():
    class Model(nn.Module):
        def forward(self, x):
            return x + 1

    program = capture(Model(), (torch.zeros(3),))
    x, add, output = program.nodes
    with program.graph.inserting_before(output):
        found = [program.graph.call_function(torch.nonzero, (node,)) for node in (x, add)]
    propagate(program, found)
    sizes = {str(node.meta["val"].shape[0]) for node in found}
    assert len(sizes) == 2


def test_dead_node(cnn):
    with cnn.graph.inserting_after(find_node(cnn, "/mean")):
        cnn.graph.call_function(torch.relu, (find_node(cnn, "/mean"),))
    propagate(cnn)
    assert invariants(cnn) == ["every node is used"]


def test_inplace_op_unless_noted(cnn):
    silu = find_node(cnn, "/silu")
    silu.target = torch.relu_
    propagate(cnn)
    assert invariants(cnn) == ["no op changes its operands"]
    assert violations(cnn.with_notes(Note("mutation", "/relu", "kept"))) == []


def test_unused_tensor_and_module_unless_noted(cnn):
    cnn.module.register_buffer("left", torch.ones(2))
    cnn.module.add_module("idle", nn.Linear(2, 2))
    cnn.module.add_module("act", nn.ReLU())
    assert sorted(v.about for v in violations(cnn)) == ["act", "idle.bias", "idle.weight", "left"]
    noted = cnn.with_notes(*(Note("unused", about, "kept") for about in ("left", "idle", "act")))
    assert violations(noted) == []


def test_ties(transformer):
    assert transformer.ties == {"head.weight": "embed.weight"}
    assert invariants(replace(transformer, ties={})) == ["ties are those of the alias table"]
    wrong = replace(transformer, ties={**transformer.ties, "gone": "embed.weight"})
    assert [v.about for v in violations(wrong)] == ["gone"]
    transformer.module.head.weight = nn.Parameter(torch.zeros(20, 16))
    assert [v.about for v in violations(transformer)] == ["head.weight"]


def test_placement(cnn):
    cnn.module.fc.to("meta")
    assert "all tensors are on one device" in invariants(cnn)


def test_tensor_that_does_not_fit_its_module(cnn):
    cnn.module.fc.weight = nn.Parameter(torch.zeros(8, 16))
    found = {v.about: v.text for v in violations(cnn)}
    assert found["fc.weight"] == "is [8, 16], and Linear was made for [10, 16]"


def test_signature(cnn):
    (tensor,) = cnn.signature.inputs
    renamed = replace(cnn.signature, inputs=(replace(tensor, name="y"),))
    assert "signature has ['y']" in str(violations(replace(cnn, signature=renamed))[0])
    (output,) = cnn.graph.find_nodes(op="output")
    output.args = ((*output.args[0], find_node(cnn, "x")),)
    assert "2 outputs for a tree of 1" in str(violations(cnn)[0])


def test_output_must_be_flat(cnn):
    (output,) = cnn.graph.find_nodes(op="output")
    output.args = (output.args[0][0],)
    assert invariants(cnn) == ["the output is one flat tuple"]


def test_lint(cnn):
    cnn.module._modules.pop("fc")
    assert invariants(cnn)[0] == "the graph is well formed"


def test_scalar_arithmetic_is_checked(transformer):
    size = find_node(transformer, "layers.0.attention/size")
    reshape = find_node(transformer, "layers.0.attention/reshape")
    with transformer.graph.inserting_after(size):
        doubled = transformer.graph.call_function(operator.mul, (size, 2))
    reshape.args = (reshape.args[0], (doubled, *reshape.args[1][1:]))
    with pytest.raises(VerifyError, match="does not work on its operands"):
        propagate(transformer, [doubled, reshape])
