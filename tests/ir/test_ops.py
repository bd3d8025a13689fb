import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxcompress.nn
from fxcompress.ir import attributes, is_known, op_name, op_of, op_spec, operands
from fxcompress.ir.ops import all_ops, is_inplace, qualified_name


def test_names_are_unique():
    names = [op.name for op in all_ops()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("op", all_ops(), ids=lambda op: op.name)
def test_every_spelling_leads_to_its_row(op):
    assert op.functions or op.methods or op.modules
    for spelling in (*op.functions, *op.methods, *op.swapped):
        assert op_of(spelling) is op
    for module in op.modules:
        space, _, name = module.rpartition(".")
        if space == "torch.nn":
            assert issubclass(getattr(nn, name), nn.Module)
    for method in (*op.methods, *op.swapped):
        assert hasattr(torch.Tensor, method)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        (torch.add, "add"),
        (operator.add, "add"),
        (operator.iadd, "add"),
        (torch.Tensor.add_, "add"),
        (torch.Tensor.__radd__, "add"),
        (torch.Tensor.__rsub__, "sub"),
        (torch.ops.aten.add.Tensor, "add"),
        (torch.ops.aten.relu_.default, "relu"),
        (torch.ops.aten._softmax.default, "softmax"),
        (torch.true_divide, "div"),
        (torch.concat, "cat"),
        (F.scaled_dot_product_attention, "sdpa"),
        (F.relu, "relu"),
        (torch.relu_, "relu"),
        (torch.special.expit, "sigmoid"),
        ("swapaxes", "transpose"),
        ("float", "to"),
        ("unfold", "window"),
        (F.unfold, "unfold"),
        (nn.ReLU6(), "relu6"),
        (nn.BatchNorm3d(2), "batch_norm"),
        (nn.ReflectionPad2d(1), "pad"),
        (nn.Identity(), "identity"),
    ],
)
def test_spellings(spelling, name):
    found = op_of(spelling)
    assert found is not None
    assert found.name == name
    assert op_spec(name) is found


def test_kinds():
    def names(flag):
        return {op.name for op in all_ops() if getattr(op, flag)}

    assert {"add", "relu", "where", "dropout"} <= names("elementwise")
    assert not {"softmax", "glu", "matmul", "sum", "view"} & names("elementwise")
    assert {"relu", "gelu", "silu"} <= names("activation")
    assert {"linear", "conv2d", "conv_transpose1d"} <= names("linear")
    assert {"batch_norm", "rms_norm"} <= names("norm")
    assert {"view", "permute", "cat", "contiguous"} <= names("shape_only")


def trace(function, *names):
    root = nn.Module()
    graph = fx.Graph(root)
    graph.output(function(*(fx.Proxy(graph.placeholder(name)) for name in names)).node)
    return list(graph.nodes)[-2]


def call(target, *args, **kwargs):
    return lambda x: fx.Proxy(x.node.graph.call_function(target, (x.node, *args), kwargs))


@pytest.mark.parametrize(
    ("function", "name", "shown", "attrs"),
    [
        (lambda x: F.conv2d(x, x, None, 2, (1, 1), groups=4), "conv2d", 2,
         {"stride": 2, "padding": 1, "groups": 4}),
        (lambda x: x.float(), "to", 1, {"dtype": torch.float32}),
        (lambda x: x.to("cpu", torch.half), "to", 1,
         {"dtype": torch.float16, "device": torch.device("cpu")}),
        (lambda x: x.mean((2, 3), True), "mean", 2, {"keepdim": True}),
        (lambda x: torch.mean(x, axis=1), "mean", 2, {}),
        (lambda x: torch.cat([x, x], -1), "cat", 1, {"dim": -1}),
        (lambda x: x.view(2, -1), "view", 2, {}),
        (lambda x: x.permute((1, 0)), "permute", 2, {}),
        (lambda x: F.dropout(x, 0.1, False, inplace=False), "dropout", 1,
         {"p": 0.1, "training": False}),
        (call(torch.batch_norm, None, None, 1, 2, False, 0.2, 1e-5, True), "batch_norm", 3,
         {"momentum": 0.2, "cudnn_enabled": True}),
        (call(torch.argsort, foo=3), "argsort", 1, {"foo": 3}),
        (call(torch.argsort, -1, False, False, 7), "argsort", 1, {"arg4": 7}),
    ],
)  # fmt: skip
def test_arguments_are_normalised(function, name, shown, attrs):
    node = trace(function, "x")
    assert op_name(node) == name
    assert len(operands(node)) == shown
    assert attributes(node) == attrs


def test_reflected_operands_change_places():
    node = trace(lambda x: x, "x")
    graph = node.graph
    reflected = graph.call_method("__rsub__", (node, 3))
    assert op_name(reflected) == "sub"
    assert operands(reflected) == [3, node]


def test_variadic_and_tuple_agree():
    a, b = trace(lambda x: x.view(2, 3), "x"), trace(lambda x: x.view((2, 3)), "x")
    assert operands(a)[1] == operands(b)[1] == (2, 3)


def own_function(x):
    return x


def test_unknown_keeps_its_qualified_name_and_arguments():
    graph = fx.Graph(nn.Module())
    x = graph.placeholder("x")
    node = graph.call_function(own_function, (x, 4), {"key": 1})
    assert op_name(node).endswith("test_ops.own_function")
    assert not is_known(node)
    assert operands(node) == [x, 4]
    assert attributes(node) == {"key": 1}
    assert qualified_name(torch.nextafter) == "torch.nextafter"
    assert qualified_name(torch.fft.fftn) == "torch.fft.fftn"
    assert qualified_name(torch.linalg.vector_norm) == "torch.linalg.vector_norm"
    assert qualified_name(F.gelu) == "torch.nn.functional.gelu"
    assert qualified_name(torch.ops.aten.add.Tensor) == "aten.add.Tensor"


def test_module_attributes_hide_what_the_type_shows():
    root = nn.Module()
    root.conv = nn.Conv2d(4, 8, (3, 3), stride=(2, 1), groups=2, bias=False)
    root.drop = nn.Dropout(0.3)
    graph = fx.Graph(root)
    x = graph.placeholder("x")
    conv, drop = graph.call_module("conv", (x,)), graph.call_module("drop", (x,))
    graph.output((conv, drop))
    fx.GraphModule(root, graph)
    assert attributes(conv) == {"k": 3, "stride": (2, 1), "groups": 2, "bias": False}
    assert attributes(drop) == {"p": 0.3}


@pytest.mark.parametrize(
    ("make", "inplace"),
    [
        (lambda g, x: g.call_method("add_", (x, 1)), True),
        (lambda g, x: g.call_method("__add__", (x, 1)), False),
        (lambda g, x: g.call_function(operator.iadd, (x, 1)), True),
        (lambda g, x: g.call_function(operator.invert, (x,)), False),
        (lambda g, x: g.call_function(operator.setitem, (x, 0, 1)), True),
        (lambda g, x: g.call_function(F.relu, (x,), {"inplace": True}), True),
        (lambda g, x: g.call_function(F.relu, (x,), {"inplace": False}), False),
        (lambda g, x: g.call_function(torch.ops.aten.add_.Tensor, (x, x)), True),
        (lambda g, x: g.call_function(torch.relu, (x,)), False),
        (lambda g, x: g.call_function(own_function, (x,)), False),
    ],
)
def test_inplace(make, inplace):
    graph = fx.Graph(nn.Module())
    assert is_inplace(make(graph, graph.placeholder("x"))) is inplace


def test_the_runtime_modules_of_the_table_exist():
    own = [name for op in all_ops() for name in op.modules if name.startswith("fxcompress.")]
    assert own
    assert {name.removeprefix("fxcompress.nn.") for name in own} <= set(fxcompress.nn.__all__)
