import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxcompress.errors import ModelError
from fxcompress.ir import capture, node_lines, parse, to_text, type_text
from fxcompress.ir._format import Spelling, number
from fxcompress.ir._numbers import Numbers
from fxcompress.ir.text import NodeLine, OutputLine, StateLine, Text
from fxcompress.testing import golden_text
from tests.ir.small_models import small_cnn, small_transformer

WORD = st.from_regex(r"[A-Za-z_][\w./-]{0,40}", fullmatch=True)
NAME = st.builds(
    lambda word, count: word if count < 2 else f"{word}@{count}", WORD, st.integers(1, 9)
)
TYPE = st.sampled_from(["f32[batch,3]", "i64[]", "(f32[2], (b8[4*seq], none))", "int(2*batch+1)"])
ARGUMENT = st.sampled_from(
    ["%a", "[%a, %b.c/d@2]", "(2, -1)", "'bhqd,bhkd->bhqk'", "'a) {b'", r"'it\'s'", "None", "1e-05",
     "(:, None, ...)", "%x:%y", "{k: (1,)}"]
)  # fmt: skip
FIGURE = st.floats(width=32, allow_subnormal=False).map(lambda x: float(number(x, 6)))
NUMBERS = st.builds(Numbers, FIGURE, FIGURE, FIGURE, FIGURE, st.integers(0, 99), st.integers(0, 99))
HASH = st.from_regex(r"[0-9a-f]{8}", fullmatch=True)
NODES = st.builds(
    NodeLine,
    id=NAME,
    op=st.from_regex(r"[a-z_][\w.]*", fullmatch=True),
    operands=st.none() | st.lists(ARGUMENT, max_size=3).map(", ".join),
    attributes=st.sampled_from(["", "k=3 stride=(2,1)", "eq='a}b{'", "attn_mask=%a.b/c"]),
    type=TYPE,
)
FLAT = st.sampled_from(["f32[2,3]", "i64[]", "bf16[8,1,1]"])
STATE = st.one_of(
    st.builds(StateLine, WORD, FLAT, NUMBERS, HASH),
    st.builds(StateLine, WORD, FLAT),
    st.builds(lambda name, tied: StateLine(name, "", tied=tied), WORD, WORD),
)
OUTPUTS = st.builds(OutputLine, st.integers(0, 99), TYPE, st.none()) | st.builds(
    OutputLine,
    st.integers(0, 99),
    FLAT,
    NUMBERS,
    st.lists(FIGURE.map(lambda x: number(x, 4)), max_size=8).map(tuple),
)
TEXTS = st.builds(
    Text,
    name=st.from_regex(r"\w[\w .-]{0,20}\w", fullmatch=True),
    nodes=st.lists(NODES, max_size=5).map(tuple),
    returns=st.lists(ARGUMENT, max_size=3).map(", ".join),
    state=st.none() | st.lists(STATE, max_size=5).map(tuple),
    outputs=st.none() | st.lists(OUTPUTS, max_size=3).map(tuple),
    totals=st.just((("nodes", 7), ("params", 902))),
)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_what_is_written_is_read_again(text):
    assert parse(text.render()).render() == text.render()


@pytest.mark.parametrize("build", [small_cnn, small_transformer])
def test_programs_are_read_again(build):
    text = golden_text(build())
    assert parse(text).render() == text
    assert golden_text(build()) == text


def test_blocks_and_totals():
    program = small_cnn()
    text = to_text(program, outputs=[torch.tensor([0.0, 3.0])])
    lines = text.splitlines()
    assert lines[0] == "fxgold/1 SmallCnn"
    assert "  %x                           = input : f32[batch,3,16,16]" in lines
    assert (
        "  %down                        = conv2d(%layers.1/relu@2) {k=3 stride=2 groups=4} "
        ": f32[batch,16,3,3]"
    ) in lines
    assert "  return %fc" in lines
    assert "  0 f32[2] mean=1.5 std=1.5 absmax=3 pos=1.5 zeros=1/2" in lines
    assert "    head 0 3" in lines
    params = sum(p.numel() for p in program.module.parameters())
    assert lines[-1] == f"totals: nodes={len(program.graph.nodes)} params={params}"
    assert "state:" not in to_text(program, state=False)


def test_ties_are_written_once():
    text = to_text(small_transformer())
    assert "  head.weight                  = embed.weight" in text


def test_meta_weights_have_no_numbers():
    with torch.device("meta"):
        model = nn.Linear(3, 4)
    text = to_text(capture(model, (torch.ones(2, 3, device="meta"),), verify=False))
    assert "  weight                       f32[4,3] meta\n" in text
    assert parse(text).render() == text


def test_node_lines():
    lines = node_lines(small_cnn())
    assert lines["/mean"] == "mean(%/mul, (2, 3)) : f32[batch,16]"
    assert lines["scale"] == "param : f32[16,1,1]"


def test_symbolic_sizes_have_their_names():
    class Flatten(nn.Module):
        def forward(self, x):
            return x.reshape(-1, 4), x.shape[0] * 2

    program = capture(Flatten(), (torch.ones(3, 8),))
    flat = next(n for n in program.nodes if n.op == "call_function")
    assert type_text(flat.meta["val"], program) == "f32[2*batch,4]"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-5, "1e-05"),
        (float("inf"), "inf"),
        (True, "True"),
        (torch.bfloat16, "bf16"),
        (torch.channels_last, "channels_last"),
        (torch.device("cpu"), "cpu"),
        (slice(1, None), "1:"),
        (slice(None, None, 2), "::2"),
        ((1,), "(1,)"),
        ([1, (2, "a")], "[1, (2, 'a')]"),
        (..., "..."),
        (None, "None"),
        (torch.relu, "torch.relu"),
    ],
)
def test_operands(value, text):
    assert Spelling().operand(value) == text


def test_types():
    assert type_text(torch.zeros(2, 3, dtype=torch.bfloat16)) == "bf16[2,3]"
    assert type_text((torch.zeros(1, dtype=torch.bool), None)) == "(b8[1], none)"
    assert type_text([3, 2.0, True]) == "(int(3), float(2.0), bool(True))"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not a golden text"),
        ("hello\n", "not a golden text"),
        ("fxgold/2 X\n\ngraph:\n", "the golden text is fxgold/2"),
        ("fxgold/1 X\n\ngraph:\n  %a = conv2d(%x : f32[]\n", "line 4 "),
        ("fxgold/1 X\n\nstate:\n  a f32[] mean=x\n", "line 4 "),
        ("fxgold/1 X\n\nnonsense:\n", "line 3 "),
        ("fxgold/1 X\n\noutputs:\n    head 1 2\n", "line 4 "),
    ],
)
def test_damaged_texts_name_the_line(text, problem):
    with pytest.raises(ModelError, match=problem):
        parse(text)


def test_numbers():
    numbers = Numbers.of(torch.tensor([0.0, 1.0, -3.0, 2.0]))
    assert str(numbers) == "mean=0 std=1.87083 absmax=3 pos=0.0625 zeros=1/4"
    swapped = Numbers.of(torch.tensor([1.0, 0.0, -3.0, 2.0]))
    assert swapped.mean == numbers.mean
    assert swapped.pos != numbers.pos
    assert Numbers.of(torch.zeros(0)).count == 0
    assert Numbers.of(torch.tensor([True, False])).mean == 0.5
    assert Numbers.of(torch.tensor([3 + 4j])).absmax == 4.0
    nan = Numbers.of(torch.tensor([float("nan")]))
    assert nan.agrees(nan, 0.0)
    assert not nan.agrees(Numbers.of(torch.ones(1)), 1.0)
