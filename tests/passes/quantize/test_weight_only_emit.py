"""What weight-only quantization is emitted as: packed files, and onnxruntime's kernels."""

import pytest
import torch

import fxcompress as fxc
from fxcompress.emit import EmitOptions, OnnxOptions, emit
from fxcompress.emit._lower_nbits import Blocks
from fxcompress.emit.kernels import runtime_kernels
from fxcompress.ir import capture
from fxcompress.nn import FakeQuantize
from fxcompress.nn.packing import unpack
from passes.quantize.weight_only import WeightOnly
from tests.passes.quantize.test_weight_only import quantised, transformer
from tests.passes.support import apply

LINEARS = 17


def emitted(program, folder, formats, **onnx):
    options = EmitOptions(onnx=OnnxOptions(**onnx))
    return {each.format: each for each in emit(program, folder, formats, options=options)}


def test_every_format_is_equal_and_small(tmp_path):
    formats = ("program", "python", "pt2", "onnx")
    program = quantised(transformer(), {"bits": 4, "embeddings": True}).program
    made = emitted(program, tmp_path / "int4", formats)
    for name in ("program", "python", "pt2"):
        assert made[name].comparison.max_abs == 0.0
    assert made["onnx"].comparison.relative < 1e-5
    floats = emitted(transformer(), tmp_path / "float", formats)
    # What is not weights: the graph, norms and biases. A pt2 archive is mostly graph here.
    for name, part in (("program", 0.25), ("python", 0.21), ("onnx", 0.22), ("pt2", 0.6)):
        assert made[name].bytes < part * floats[name].bytes
    for name in ("python", "pt2"):
        assert "18 weights are stored as 4-bit integers, packed in bytes" in made[name].notes
    source = (tmp_path / "int4" / "model.py").read_text()
    assert "class PackedWeight" in source


@pytest.mark.parametrize(
    "options",
    [{"bits": 3}, {"bits": 5, "group": None}, {"bits": 8, "symmetric": True}],
    ids=str,
)  # fmt: skip
def test_widths_in_stand_alone_source(options, tmp_path):
    program = quantised(transformer(), options).program
    made = emitted(program, tmp_path, ("python",))
    assert all(each.comparison.max_abs == 0.0 for each in made.values())


@pytest.mark.parametrize(
    ("options", "matmuls"),
    [({"bits": 4, "group": None}, LINEARS), ({"bits": 3, "symmetric": True}, LINEARS),
     ({"bits": 4, "group": 8}, 0), ({"bits": 8}, 0)],
    ids=str,
)  # fmt: skip
def test_kernels_of_onnxruntime(options, matmuls, tmp_path):
    program = quantised(transformer(), options).program
    made = emitted(program, tmp_path, ("onnx",))["onnx"]
    assert made.comparison.relative < 1e-5
    assert runtime_kernels(tmp_path / "model.onnx")["MatMulNBits"] == matmuls
    if matmuls:
        assert f"{LINEARS} linear layers are MatMulNBits" in made.notes


def test_activations_may_be_rounded(tmp_path):
    program = quantised(transformer(), {"bits": 8, "group": 64}).program
    made = emitted(program, tmp_path, ("onnx",), activations="int8")["onnx"]
    assert runtime_kernels(tmp_path / "model.onnx")["MatMulNBits"] == LINEARS
    assert 1e-5 < made.comparison.relative < 2e-2
    assert any("rounded to int8" in note for note in made.notes)


def test_embeddings_are_looked_up_in_blocks(tmp_path):
    options = {"embeddings": True, "types": ["Embedding"], "group": 64}
    program = apply(WeightOnly, transformer(), options).program
    made = emitted(program, tmp_path, ("onnx",))["onnx"]
    assert runtime_kernels(tmp_path / "model.onnx")["GatherBlockQuantized"] == 1
    assert made.comparison.relative < 1e-5


@pytest.mark.parametrize("columns", [64, 96, 100])
@pytest.mark.parametrize("group", [None, 32, 4])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (3, True), (2, False), (8, True)])
def test_blocks_hold_the_weight(bits, symmetric, group, columns):
    weight = torch.randn(6, columns, generator=torch.Generator().manual_seed(bits))
    shape = (6,) if group is None else (6, -(-columns // group))
    fake = FakeQuantize(
        bits, signed=symmetric, symmetric=symmetric, axis=0, group=group, shape=shape
    )
    missing = 0 if group is None else -columns % group
    rows = torch.nn.functional.pad(weight, (0, missing)).reshape(*shape, -1)
    fake.fit(rows.amin(-1), rows.amax(-1))
    blocks = Blocks.of(fake, weight)
    if group == 4:
        assert blocks is None
        return
    count = blocks.scale.shape[1]
    integers = unpack(blocks.integers.flatten(), blocks.bits, 6 * count * blocks.size)
    integers = integers.reshape(6, count, blocks.size).float()
    if blocks.zero_point is None:
        zero = torch.full((6, count), 2.0 ** (blocks.bits - 1))
    else:
        wide = count + count % (8 // blocks.bits)
        zero = unpack(blocks.zero_point.flatten(), blocks.bits, 6 * wide)
        zero = zero.reshape(6, wide)[:, :count].float()
    made = ((integers - zero[..., None]) * blocks.scale[..., None]).flatten(1)
    assert torch.allclose(made[:, :columns], fake(weight), atol=1e-6)
    assert not bool(made[:, columns:].any())
    assert (blocks.zero_point is None) == symmetric


def test_blocks_take_the_fewest_bytes():
    fake = FakeQuantize(4, signed=False, symmetric=False, axis=0, group=128, shape=(2, 11))
    weight = torch.randn(2, 1376, generator=torch.Generator().manual_seed(0))
    found, whole = Blocks.of(fake, weight), Blocks.of(fake, weight, whole=True)
    assert (found.size, found.scale.shape[1]) == (128, 11), "the last one is filled up"
    assert (whole.size, whole.scale.shape[1]) == (32, 43), "as a table is looked up"
    assert found.integers.numel() + 4 * 22 < whole.integers.numel() + 4 * 86


@pytest.mark.parametrize(("bits", "group", "matmuls"), [(4, 48, LINEARS), (8, 40, 0)])
def test_rows_that_end_in_a_shorter_group(bits, group, matmuls, tmp_path):
    options = {"bits": bits, "group": group, "embeddings": True}
    program = quantised(transformer(), options).program
    made = emitted(program, tmp_path, ("program", "python", "pt2", "onnx"))
    for name in ("program", "python", "pt2"):
        assert made[name].comparison.max_abs == 0.0
    assert made["onnx"].comparison.relative < 1e-5
    assert runtime_kernels(tmp_path / "model.onnx")["MatMulNBits"] == matmuls
    assert "padding=" in (tmp_path / "model.py").read_text()


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_groups_of_convolutions_in_stand_alone_source(rank, tmp_path):
    torch.manual_seed(rank)
    layer = getattr(torch.nn, f"Conv{rank}d")(8, 6, 3)
    program = capture(layer.eval(), (torch.randn(2, 8, *[5] * rank),))
    group = 8 * 3**rank // 3
    step = {"use": "quantize.weight_only", "method": "rtn", "bits": 4, "group": group}
    (made,) = emit(fxc.compress(program, [step]).program, tmp_path, ["python"])
    assert made.comparison.max_abs == 0.0
    assert "grouped=True" in (tmp_path / "model.py").read_text()


class Tied(torch.nn.Module):
    """A table of words that is read as a parameter for the output too."""

    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(40, 32)
        self.inner = torch.nn.Linear(32, 32)

    def forward(self, ids):
        return torch.nn.functional.linear(self.inner(self.words(ids)).relu(), self.words.weight)


@pytest.mark.parametrize("options", [{"bits": 8, "group": None}, {"bits": 4, "group": 16}], ids=str)
def test_a_table_read_by_two_nodes_is_stored_once(options, tmp_path):
    torch.manual_seed(0)
    program = capture(Tied().eval(), (torch.randint(0, 40, (2, 5)),))
    made = quantised(program, {**options, "embeddings": True}).program
    calls = [str(node.target) for node in made.nodes if "words" in str(node.target)]
    assert calls.count("words_weight_fq") == 2, "the graph calls its quantizer twice"
    found = emitted(made, tmp_path, ("python", "pt2", "onnx"))
    assert all(each.comparison.relative < 0.01 for each in found.values())
