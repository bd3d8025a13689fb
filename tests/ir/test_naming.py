import torch
from torch import fx, nn

from fxcompress.ir import find_node, node_ids
from tests.ir.small_models import small_cnn


def test_ids_follow_modules_and_scopes():
    ids = list(node_ids(small_cnn()).values())
    assert ids[:7] == [
        "x",
        "stem.0",
        "stem.1",
        "layers.0.conv1",
        "layers.0.bn1",
        "layers.0/relu",
        "layers.0.conv2",
    ]
    assert "layers.0/relu@2" in ids
    assert "/silu" in ids
    assert "scale" in ids
    assert ids[-1] == "output"
    assert len(set(ids)) == len(ids)


def test_fx_names_do_not_matter():
    program = small_cnn()
    before = list(node_ids(program).values())
    for place, node in enumerate(program.nodes):
        node._rename(f"other_{place}")
    assert list(node_ids(program).values()) == before


def test_insertion_renumbers_only_its_own_name():
    program = small_cnn()
    before = node_ids(program)
    silu = find_node(program, "/silu")
    with program.graph.inserting_before(silu):
        added = program.graph.call_function(torch.relu, (silu.args[0],))
        added.meta["scope"] = (("layers.0", "Block"),)
    after = node_ids(program)
    assert after[added] == "layers.0/relu@3"
    assert {n: i for n, i in after.items() if n is not added} == before


def test_a_reused_module_is_counted():
    root = nn.Module()
    root.act = nn.ReLU()
    graph = fx.Graph(root)
    x = graph.placeholder("x")
    y = graph.call_module("act", (x,))
    graph.output((graph.call_module("act", (y,)),))
    module = fx.GraphModule(root, graph)
    assert list(node_ids(module).values()) == ["x", "act", "act@2", "output"]
    assert find_node(small_cnn(), "nothing") is None
