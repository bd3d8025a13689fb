"""The emitted Python: what it reads like, and the pieces it is made of."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.emit import EmitOptions
from fxcompress.emit import python as python_format
from fxcompress.emit._job import Job
from fxcompress.emit._lower import is_quantized
from fxcompress.emit._plain import plain_program
from fxcompress.emit._probes import probes
from fxcompress.emit._source.layout import space_slices, wrap
from fxcompress.emit._source.literals import Literals, fill, literal_text, visible_length
from fxcompress.ir import Program, capture
from tests.emit.models import conv_net, language_model, seeded
from tests.emit.test_emit import load_source, quantized_conv_net


def write(program: Program, folder: Path) -> str:
    """Write the source, check that it computes the same in this process, return it."""
    plain = plain_program(program)
    calls = probes(program, None, seed=0)
    job = Job(program, folder, EmitOptions(), calls[0], is_quantized(plain.module))
    python_format.write(job)
    model = load_source(folder / "model.py")
    for leaves in calls:
        call = plain.call(leaves)
        wanted = torch.utils._pytree.tree_leaves(plain.module(*call.args, **call.kwargs))
        found = torch.utils._pytree.tree_leaves(model(*call.args, **call.kwargs))
        for one, two in zip(wanted, found, strict=True):
            torch.testing.assert_close(one, two)
    return (folder / "model.py").read_text()


def class_source(text: str, name: str) -> str:
    start = text.index(f"class {name}(")
    return text[start : text.find("\n\n\n", start)].strip()


def test_a_residual_network_reads_as_if_written_by_hand(tmp_path: Path) -> None:
    text = write(conv_net(), tmp_path)
    assert (
        class_source(text, "BlockWithShortcut")
        == '''
class BlockWithShortcut(nn.Module):
    """Block at `stages.2`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 16, kernel_size=3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.shortcut = nn.Sequential(
            nn.Conv2d(8, 16, kernel_size=1, stride=2), nn.BatchNorm2d(16)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))
'''.strip()
    )
    assert "Block(channels=8)," in class_source(text, "ConvNet")
    assert text.count("class Block") == 2, "blocks that differ in numbers only share a class"


def test_a_transformer_keeps_its_layers_in_a_loop(tmp_path: Path) -> None:
    text = write(language_model(), tmp_path)
    assert (
        class_source(text, "Attention")
        == '''
class Attention(nn.Module):
    """Attention at `layers.0.attention` and 2 more."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(32, 32)
        self.key = nn.Linear(32, 32)
        self.value = nn.Linear(32, 32)
        self.out = nn.Linear(32, 32)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, seq = x.shape[:2]
        query = self.query(x).reshape(batch, seq, 4, 8).transpose(1, 2)
        key = self.key(x).reshape(batch, seq, 4, 8).transpose(1, 2)
        value = self.value(x).reshape(batch, seq, 4, 8).transpose(1, 2)
        mask = mask[:, None, None, :]
        attention = F.scaled_dot_product_attention(
            query, key, value, mask, 0.1 if self.training else 0.0
        )
        return self.out(attention.transpose(1, 2).reshape(batch, seq, 32))
'''.strip()
    )
    model = class_source(text, "LanguageModel")
    assert "nn.ModuleList(Layer() for _ in range(3))" in model
    assert "for layer in self.layers:\n            embedded = layer(embedded, mask)" in model


def test_integer_layers_keep_their_names(tmp_path: Path) -> None:
    text = write(quantized_conv_net(), tmp_path)
    assert "self.conv1 = Int8Conv2d(" in text
    assert "class FakeQuantize(nn.Module):" in text
    assert "class IntegerWeight" not in text, "helpers that are not used are left out"


@pytest.mark.parametrize("make", [conv_net, language_model, quantized_conv_net])
def test_the_source_needs_no_formatter_and_no_linter(make: object, tmp_path: Path) -> None:
    pytest.importorskip("ruff")
    assert callable(make)
    write(make(), tmp_path)
    path = str(tmp_path / "model.py")
    ruff = [sys.executable, "-m", "ruff"]
    rules = ["--isolated", "--line-length=88", "--no-cache"]
    subprocess.run([*ruff, "format", "--check", *rules, path], check=True)
    subprocess.run([*ruff, "check", "--select=E,F,I,UP,B", *rules, path], check=True)


class Shared(nn.Module):
    """One layer called twice, apart."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(torch.sigmoid(self.b(x)))
        return self.b(x[:, ::2].repeat(1, 2)) - 2 * x**2


class Parts(nn.Module):
    """Results taken apart, a tensor of one's own, arithmetic on sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 6))
        self.rnn = nn.LSTM(6, 5, batch_first=True)
        self.register_buffer("offset", torch.arange(6.0), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        batch = x.shape[0]
        x = x.reshape(batch * 2, 3, 6) * self.scale + self.offset
        one, two, three = x.chunk(3, dim=1)
        y, (h, _) = self.rnn(x)
        y = y.reshape(batch, -1)
        return y, h, [one + two, F.pad(three, (1, 2))]


class Added(nn.Module):
    """A normalisation that holds its activation, as timm's do."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = ActNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x)


class ActNorm(nn.BatchNorm1d):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.act = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
        return self.act(y)


@pytest.mark.parametrize(
    ("model", "shape"), [(Shared(), (4,)), (Parts(), (6, 6)), (Added(), (6,))], ids=type
)
def test_unusual_structures_compute_the_same(
    model: nn.Module, shape: tuple[int, ...], tmp_path: Path
) -> None:
    text = write(capture(seeded(model), (torch.zeros(2, *shape),), verify=False), tmp_path)
    compile(text, "model.py", "exec")


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write(conv_net(), tmp_path)
    path = tmp_path / "weights.safetensors"
    good = load_file(path)
    for change, message in [
        ({"extra": torch.zeros(1)}, "has no tensor extra"),
        ({"fc.bias": torch.zeros(3)}, r"fc.bias is \[3\], not \[10\]"),
        ({"fc.bias": None}, "does not hold fc.bias"),
    ]:
        state = {k: v for k, v in {**good, **change}.items() if v is not None}
        save_file(state, path)
        with pytest.raises(ValueError, match=message):
            load_source(tmp_path / "model.py")


@pytest.mark.parametrize(
    ("line", "wrapped"),
    [
        ("x = f(a, b)", ["x = f(a, b)"]),
        ("x = function(alpha, beta, gamma)", ["x = function(", "    alpha, beta, gamma", ")"]),
        (
            "x = function(alpha_value, beta_value, g)",
            ["x = function(", "    alpha_value,", "    beta_value,", "    g,", ")"],
        ),
        (
            "x = alpha_value + beta_value * y",
            ["x = (", "    alpha_value", "    + beta_value * y", ")"],
        ),
        (
            'x = f("a, (b", [1, 2, 3, 4, 5, 6])',
            ["x = f(", '    "a, (b",', "    [1, 2, 3, 4, 5, 6],", ")"],
        ),
    ],
)
def test_long_lines_are_wrapped(line: str, wrapped: list[str]) -> None:
    assert wrap(line, 0, width=27 if "alpha_value," in line else 28) == wrapped


def test_slices_with_attributes_get_spaces() -> None:
    assert space_slices("x[:, self.a:self.b, 1:2]") == "x[:, self.a : self.b, 1:2]"
    assert space_slices('{"a": x[:self.n]}') == '{"a": x[: self.n]}'


def test_literals_leave_holes_of_a_typical_width() -> None:
    literals = Literals()
    text = f"f({literals.hole(1024)}, {literals.hole(0.125)})"
    assert visible_length(text) == len("f(000, 0000000000)")
    assert fill(text, ["a", "b"]) == "f(a, b)"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("it's", '"it\'s"'),
        ((1,), "(1,)"),
        (-3.4e38, "-3.4e38"),
        (float("-inf"), 'float("-inf")'),
        ([1, (2, None)], "[1, (2, None)]"),
        ({"a": True}, '{"a": True}'),
    ],
)
def test_literals_are_written_so_that_they_read_back(value: object, text: str) -> None:
    assert literal_text(value) == text
    assert eval(text) == value
