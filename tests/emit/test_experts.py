"""Mixtures of experts in files: each token still costs only its own experts."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxcompress._torchvision import declare_operators
from fxcompress.emit import _source, emit
from fxcompress.emit._grouped import name_products, write_products_out
from fxcompress.emit._plain import plain_program
from fxcompress.ir import capture
from fxcompress.nn import Experts
from fxcompress.nn.experts import ACTIVATIONS, GATES

COMMON = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24,
    "num_attention_heads": 2, "num_key_value_heads": 1, "use_cache": False,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Olmoe": EXPERTS,
    "Qwen2Moe": {
        **EXPERTS, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
        "decoder_sparse_step": 1,
    },
    "Qwen3Moe": {
        **EXPERTS, "moe_intermediate_size": 24, "decoder_sparse_step": 1, "head_dim": 8,
    },
}  # fmt: skip


def program_of(name):
    declare_operators()
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**COMMON, **MODELS[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    ids = torch.randint(0, 40, (2, 7))
    sizes = {"input_ids": {0: "batch", 1: "seq"}}
    return capture(model, (), {"input_ids": ids}, dynamic=sizes)


@pytest.mark.parametrize(
    "name", ["Mixtral", *(pytest.param(n, marks=pytest.mark.slow) for n in list(MODELS)[1:])]
)
def test_models_of_experts_are_written_and_run_without_their_library(name, tmp_path):
    # Emitting reloads each file without the library, at other sizes, and compares.
    emit(program_of(name), tmp_path, ["pt2", "python", "onnx"])
    source = (tmp_path / "model.py").read_text()
    assert "F.grouped_mm(" in source
    assert "transformers" not in source
    import onnx

    model = onnx.load(tmp_path / "model.onnx")
    # One product for each expert, on a slice of the tokens.
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Slice") >= 2 * 3


class Products(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, rows, ids):
        ids, order = torch.sort(ids)
        counts = torch.histc(ids.float(), bins=4, min=0, max=3)
        ends = torch.cumsum(counts, 0, dtype=torch.int32)
        return F.grouped_mm(rows[order], self.weight, offs=ends), counts


@pytest.mark.parametrize("ids", [[0, 1, 2, 3], [3, 3, 3, 3], [2, 0, 2, 0]], ids=str)
def test_written_out_they_are_the_same(ids):
    torch.manual_seed(0)
    rows, ids = torch.randn(4, 8), torch.tensor(ids)
    model = Products()
    graph = torch.fx.symbolic_trace(model)
    wanted = model(rows, ids)
    for node in graph.graph.nodes:
        shapes = {"weight": (4, 8, 8), "getitem_2": (4, 8)}
        if node.name in shapes:
            node.meta["val"] = torch.empty(shapes[node.name])
    write_products_out(graph)
    targets = {getattr(node.target, "__name__", "") for node in graph.graph.nodes}
    assert targets.isdisjoint({"_grouped_mm", "grouped_mm", "histc"})
    for got, want in zip(graph(rows, ids), wanted, strict=True):
        torch.testing.assert_close(got, want)


class Routed(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.router = nn.Linear(6, 4)
        self.experts = Experts(4, 6, 5, **settings)

    def forward(self, x):
        weights, indices = self.router(x).softmax(-1).topk(2, -1)
        return x + self.experts(x, weights, indices)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"activation": "gelu_tanh"}, id="gated", marks=pytest.mark.slow),
        pytest.param({"activation": "relu", "gated": False, "biases": ("up", "down")}, id="plain"),
    ],
)
def test_the_leaf_is_written_in_every_format(settings, tmp_path):
    torch.manual_seed(0)
    sizes = {"x": {0: "batch", 1: "seq"}}
    program = capture(Routed(**settings), (torch.randn(2, 5, 6),), dynamic=sizes)
    emit(program, tmp_path, ["pt2", "python", "onnx", "openvino"])
    source = (tmp_path / "model.py").read_text()
    assert "fxcompress" not in source.partition('"""')[2].partition('"""')[2]
    assert "self.experts = Experts(" in source


@pytest.mark.parametrize("activation", [*ACTIVATIONS, *GATES])
def test_the_source_s_copy_of_the_leaf_computes_the_same(activation):
    template = Path(_source.__file__).parent / "templates" / "Experts.jinja"
    names = {"torch": torch, "F": F, "nn": nn, "Tensor": torch.Tensor}
    exec(template.read_text(), names)
    biases = ("gate", "up", "down")
    module = Experts(3, 6, 5, activation, biases=biases)
    copy = names["Experts"](3, 6, 5, activation, biases=biases)
    copy.load_state_dict(module.state_dict())
    routed = torch.randn(4, 6), torch.rand(4, 2), torch.tensor([[0, 2], [2, 0], [2, 2], [0, 0]])
    assert torch.equal(copy(*routed), module(*routed))


def test_python_calls_torch_s_own():
    plain = plain_program(program_of("Mixtral"))
    name_products(plain.module)
    targets = [n.target for n in plain.module.graph.nodes if "grouped" in n.name]
    assert targets == [F.grouped_mm, F.grouped_mm]
