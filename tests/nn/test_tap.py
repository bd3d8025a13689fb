import torch
from torch import fx, nn

from fxcompress.ir import describe
from fxcompress.nn import Tap


def test_returns_its_operand_itself():
    x = torch.randn(2, 3)
    assert Tap("hidden")(x) is x


def test_is_described_by_its_arguments():
    tap = Tap("hidden", at="layers.0", what="query", teacher="encoder.0", opened=True)
    config = describe(tap)
    assert dict(config.kwargs) == {
        "name": "hidden",
        "at": "layers.0",
        "what": "query",
        "teacher": "encoder.0",
        "opened": True,
    }
    again = config.build()
    assert describe(again) == config


def test_torchs_own_clean_up_keeps_it():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.tap = Tap("hidden")

        def forward(self, x):
            self.tap(x)
            return x + 1

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m, path):
            return isinstance(m, Tap) or super().is_leaf_module(m, path)

    net = Net()
    graph = Tracer().trace(net)
    module = fx.GraphModule(net, graph)
    module.graph.eliminate_dead_code()
    assert [node.target for node in module.graph.nodes if node.op == "call_module"] == ["tap"]
