import json
import math
import operator
import os
import zipfile
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fxcompress.errors import ModelError
from fxcompress.ir import Program, capture, find_node, graph_to_json, program_from_json, to_text
from fxcompress.ir._packing import pack_weights
from fxcompress.ir._targets import check_method, resolve_function, write_function
from fxcompress.ir.ops import all_ops
from fxcompress.ir.storage import stored_tensors
from fxcompress.nn import Binarize, FloatQuantize
from fxcompress.testing import assert_equivalent, hash_weights_
from tests.ir.small_models import SmallTransformer, small_cnn, small_transformer


@pytest.mark.parametrize("build", [small_cnn, small_transformer])
def test_round_trip(build, tmp_path):
    program = build()
    path = program.save(tmp_path / "a.fxp")
    loaded = Program.load(path)
    assert loaded.fingerprint() == program.fingerprint()
    assert to_text(loaded) == to_text(program)
    assert list(loaded.module.state_dict()) == list(program.module.state_dict())
    assert loaded.ties == program.ties
    assert loaded.notes == program.notes
    assert_equivalent(program, loaded, tolerance=0)
    again = loaded.save(tmp_path / "b.fxp")
    assert again.read_bytes() == path.read_bytes()
    scopes = [node.meta.get("scope") for node in program.nodes if node.op != "output"]
    assert [node.meta.get("scope") for node in loaded.nodes if node.op != "output"] == scopes


LAYERS = {
    "linear": lambda w: nn.Linear(w, w),
    "linear-bare": lambda w: nn.Linear(w, w, bias=False),
    "norm": lambda w: nn.LayerNorm(w, eps=1e-3),
    "batch-norm": lambda w: nn.BatchNorm1d(w, affine=False),
    "gelu": lambda w: nn.GELU("tanh"),
    "prelu": lambda w: nn.PReLU(),
    "dropout": lambda w: nn.Dropout(0.25),
    "half": lambda w: nn.Identity(),
}


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(sorted(LAYERS)), max_size=5), st.integers(1, 6), st.booleans())
def test_random_stacks_round_trip(tmp_path, names, width, training):
    model = nn.Sequential(nn.Linear(3, width), *(LAYERS[name](width) for name in names))
    hash_weights_(model.train(training))
    program = capture(model, (torch.zeros(4, 3),), verify=False)
    loaded = Program.load(program.save(tmp_path / "stack.fxp"))
    assert to_text(loaded) == to_text(program)
    assert loaded.module.training is training
    assert all(module.training is training for module in loaded.module.modules())
    assert_equivalent(program, loaded, tolerance=0)


def test_tensors_stay_tied_and_flags_stay(tmp_path):
    model = hash_weights_(SmallTransformer(1).eval())
    model.position.requires_grad_(False)
    program = capture(model, (torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4)))
    loaded = Program.load(program.save(tmp_path / "a.fxp"))
    assert loaded.module.head.weight is loaded.module.embed.weight
    assert loaded.module.position.requires_grad is False
    assert loaded.module.embed.weight.requires_grad is True
    assert "offsets" not in loaded.module.state_dict()
    assert loaded.module.offsets.dtype == torch.int64


def test_document_and_tensors_apart():
    program = small_cnn()
    document = json.loads(json.dumps(graph_to_json(program)))
    tensors = stored_tensors(program)
    loaded = program_from_json(document, tensors)
    assert loaded.fingerprint() == program.fingerprint()
    assert loaded.module.fc.weight.data_ptr() == program.module.fc.weight.data_ptr()
    assert graph_to_json(loaded) == graph_to_json(program)


def test_lstm(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(3, 4, batch_first=True)

        def forward(self, x):
            return self.rnn(x)[0]

    program = capture(hash_weights_(Model().eval()), (torch.zeros(2, 5, 3),))
    loaded = Program.load(program.save(tmp_path / "a.fxp"))
    x = torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(program(x), loaded(x))


class NormAct(nn.BatchNorm2d):
    """A leaf with a child of its own, as timm has them."""

    def __init__(self, width):
        super().__init__(width)
        self.act = nn.SiLU()

    def forward(self, x):
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
        return self.act(x)


def test_leaf_inside_a_leaf(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), NormAct(4)).eval()
    program = capture(hash_weights_(model), (torch.zeros(2, 3, 4, 4),))
    loaded = Program.load(program.save(tmp_path / "a.fxp"))
    assert to_text(loaded) == to_text(program)
    assert "%1.act " in to_text(loaded)
    assert_equivalent(program, loaded, tolerance=0)


def test_attention_module_keeps_its_own_children(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    program = capture(hash_weights_(Model().eval()), (torch.zeros(2, 5, 8),), opaque=("attention",))
    loaded = Program.load(program.save(tmp_path / "a.fxp"))
    assert_equivalent(program, loaded, tolerance=0)


def test_meta_weights(tmp_path):
    with torch.device("meta"):
        model = nn.Linear(3, 4)
    program = capture(model, (torch.zeros(2, 3, device="meta"),), verify=False)
    loaded = Program.load(program.save(tmp_path / "a.fxp"))
    assert all(tensor.is_meta for tensor in loaded.state().values())
    assert to_text(loaded) == to_text(program)


@dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...]


class Structured(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, data, flag=True):
        y = self.fc(data["x"])
        return Output(y, (F.relu(y), data["x"]))


def test_nested_inputs_and_dataclass_output(tmp_path):
    program = capture(hash_weights_(Structured().eval()), ({"x": torch.zeros(2, 3)},))
    loaded = Program.load(program.save(tmp_path / "a.fxp"))
    result = loaded({"x": torch.ones(5, 3)})
    assert isinstance(result, Output)
    assert result.hidden[0].shape == (5, 4)


def test_the_file_holds_no_pickle_and_only_two_entries(tmp_path):
    path = small_cnn().save(tmp_path / "a.fxp")
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["program.json", "state.safetensors"]
        assert all(i.compress_type == zipfile.ZIP_STORED for i in archive.infolist())
        assert all(i.date_time == (1980, 1, 1, 0, 0, 0) for i in archive.infolist())
    assert os.listdir(tmp_path) == ["a.fxp"]


class Own(nn.Module):
    def forward(self, x):
        return x * 2


class WithOwn(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Own()

    def forward(self, x):
        return self.inner(x) + 1


def test_opaque_module_is_refused_by_name(tmp_path):
    program = capture(WithOwn(), (torch.zeros(2, 3),), opaque=("inner",))
    with pytest.raises(ModelError, match=r"module inner is a .*\.Own, which cannot be saved"):
        program.save(tmp_path / "a.fxp")
    assert os.listdir(tmp_path) == []


def own_function(x):
    return x


def test_unknown_function_is_refused_by_node(tmp_path):
    program = small_cnn()
    find_node(program, "/silu").target = own_function
    with pytest.raises(ModelError, match=r"own_function cannot be saved"):
        program.save(tmp_path / "a.fxp")


FUNCTIONS = [
    torch.relu, F.gelu, torch.fft.fftn, torch.fft.rfft, torch.linalg.vector_norm, operator.mul,
    torch.special.expit, torch.sym_max, math.floor, torch.ops.aten.add.Tensor, torch.ops.aten.relu,
    torch.einsum, torch.split, F.scaled_dot_product_attention, F.max_pool2d, torch.cdist, abs,
]  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda each: each.__name__)
def test_functions_are_found_again(function):
    assert resolve_function(write_function(function)) is function


def test_every_function_of_the_table_can_be_saved():
    for op in all_ops():
        for function in op.functions:
            if function is not getattr:
                assert resolve_function(write_function(function)) is function, op.name
        for method in op.methods:
            assert check_method(method) == method


def rewritten(program, change):
    document = graph_to_json(program)
    change(document)
    return lambda: program_from_json(document, stored_tensors(program))


def node_of(document, target):
    return next(n for n in document["nodes"] if n["target"] == target)


@pytest.mark.parametrize(
    "target",
    ["torch.load", "torch.save", "torch.hub.load", "os.system", "operator.call", "builtins.eval",
     "operator.attrgetter", "fxcompress.ir.capture", "torch.ops.loader.load_library", "builtins",
     "torch.nn.functional.__builtins__", "subprocess.run", "math.__loader__",
     "torch.__getattr__", "torch.__class__"],
)  # fmt: skip
def test_a_file_calls_only_functions_of_tensors(target):
    def change(document):
        node_of(document, "torch.nn.functional.silu")["target"] = target

    with pytest.raises(ModelError, match="must not call"):
        rewritten(small_cnn(), change)()


@pytest.mark.parametrize("method", ["register_hook", "__reduce__", "numpy", "apply_", "backward"])
def test_a_file_calls_only_methods_that_compute(method):
    def change(document):
        node = node_of(document, "torch.nn.functional.silu")
        node["op"], node["target"] = "call_method", method

    with pytest.raises(ModelError, match="must not call the method"):
        rewritten(small_cnn(), change)()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda d: d.update(version=99), "saved in format 99"),
        (lambda d: d.update(format="x"), "not a saved program"),
        (lambda d: d.pop("nodes"), "damaged"),
        (lambda d: d["nodes"].pop(3), "damaged|does not|every"),
        (lambda d: d["modules"]["fc"].update({"class": "os.system"}), "not a module of torch"),
        (lambda d: d["tensors"]["fc.weight"].update(shape=[3, 3]), "does not fit"),
        (lambda d: d["tensors"]["fc.weight"].update(dtype="float99"), "no dtype"),
        (lambda d: d["modules"]["fc"]["kwargs"].update(out_features=4), "made for"),
    ],
)
def test_damaged_documents(change, problem):
    with pytest.raises(Exception, match=problem) as raised:
        rewritten(small_cnn(), change)()
    assert type(raised.value).__module__ == "fxcompress.errors"


def test_missing_tensor():
    program = small_cnn()
    tensors = stored_tensors(program)
    del tensors["fc.bias"]
    with pytest.raises(ModelError, match=r"tensor fc\.bias is missing"):
        program_from_json(graph_to_json(program), tensors)


def test_damaged_files(tmp_path):
    path = small_cnn().save(tmp_path / "a.fxp")
    whole = path.read_bytes()
    with pytest.raises(ModelError, match="does not exist"):
        Program.load(tmp_path / "none.fxp")
    for broken in (b"", b"PK", whole[: len(whole) // 2], whole[:-30], b"x" * 100):
        path.write_bytes(broken)
        with pytest.raises(ModelError, match="damaged"):
            Program.load(path)
    middle = whole.index(b'"nodes"')
    path.write_bytes(whole[:middle] + b'"nodez"' + whole[middle + 7 :])
    with pytest.raises(ModelError, match="damaged"):
        Program.load(path)


def test_a_failed_save_keeps_the_old_file(tmp_path):
    program = small_cnn()
    path = program.save(tmp_path / "a.fxp")
    before = path.read_bytes()
    find_node(program, "/silu").target = own_function
    with pytest.raises(ModelError):
        program.save(path)
    assert path.read_bytes() == before
    with pytest.raises(ModelError, match="cannot write"):
        small_cnn().save(path / "below.fxp")


@pytest.mark.parametrize(
    ("quantizer", "bits"),
    [(Binarize(axis=0, shape=(6,)), 1), (FloatQuantize("e5m2", axis=0, shape=(6,)), 8)],
    ids=["binary", "float8"],
)
def test_weights_of_one_bit_and_8_bit_floats_are_packed(tmp_path, quantizer, bits):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.quantizer = nn.Parameter(torch.randn(6, 43)), quantizer

        def forward(self, x):
            return F.linear(x, self.quantizer(self.weight))

    torch.manual_seed(0)
    model = Model()
    with torch.no_grad():
        quantizer.scale.copy_(torch.rand(6) / 9)
        model.weight.copy_(quantizer(model.weight))
    program = capture(model, (torch.randn(2, 43),))
    program.save(tmp_path / "model.fxp")
    stored, _ = pack_weights(program, stored_tensors(program))
    stored = stored["weight"]
    assert stored.dtype == torch.uint8
    assert stored.numel() == -(-6 * 43 * bits // 8)
    back = Program.load(tmp_path / "model.fxp")
    assert torch.equal(back.state()["weight"], program.state()["weight"])
    assert back.fingerprint() == program.fingerprint()
    with torch.no_grad():
        model.weight[0, 0] = 0.7
    latent = capture(model, (torch.randn(2, 43),))
    assert pack_weights(latent, stored_tensors(latent))[0]["weight"].dtype == torch.float32
