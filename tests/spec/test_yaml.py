"""YAML 1.2 with positions, and every way a document can be refused."""

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.errors import SpecError
from fxcompress.spec._emit_yaml import to_yaml
from fxcompress.spec._yaml import MAX_BYTES, MAX_DEPTH, MAX_NODES, parse_text, read_file


def test_scalars_follow_yaml_1_2() -> None:
    text = "[1e-3, no, 010, 0o10, 0x1F, true, ~, .inf, 1., '1', yes, 2001-01-01, 1_000, -4, +2]"
    assert parse_text(text, "t").plain() == [
        0.001, "no", 10, 8, 31, True, None, math.inf, 1.0, "1", "yes", "2001-01-01", "1_000", -4, 2,
    ]  # fmt: skip


def test_anchors_and_explicit_tags() -> None:
    assert parse_text("a: &x [1]\nb: *x\nc: !!str 4\nd: !!float 4", "t").plain() == {
        "a": [1],
        "b": [1],
        "c": "4",
        "d": 4,
    }


def test_positions_count_from_one() -> None:
    tree = parse_text("a:\n  - b: 1\n    c: [x, yz]\n", "t")
    node = tree.items["a"].items[0]  # type: ignore[union-attr]
    assert str(node.key_origin("c")) == "t:3"  # type: ignore[union-attr]
    leaf = node.items["c"].items[1].origin  # type: ignore[union-attr]
    assert (leaf.line, leaf.column, leaf.width) == (3, 12, 2)
    assert leaf.excerpt() == "    3 |     c: [x, yz]\n      |            ^^"


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "\n".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]"
    for old, new in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: [1", 1, "expected ',' or ']'"),
        ("a: 1\nb: c: d", 2, "mapping values are not allowed"),
        ("a: 1\n\tb: 2", 2, "'\\t'"),
        ("a: 1\nb: 2\na: 3", 3, "duplicate key `a`"),
        ("a: {b: 1, b: 2}", 1, "duplicate key `b`"),
        ("a: \x01", 1, "U+0001"),
        ("--- a\n--- b", 2, "second document"),
        ("a: *x", 1, "no finished anchor"),
        ("a: &x [*x]", 1, "no finished anchor"),
        ("? [q]\n: 3", 1, "plain word"),
        ("<<: {a: 1}", 1, "merge keys"),
        ("a: !foo 3", 1, "tag `!foo`"),
        ("a: !!python/object:os.system x", 1, "is not allowed"),
        ("a: !!int x", 1, "no int"),
        ('a: "\\ud800"', 1, "surrogate"),
        ("a: " + "9" * 5000, 1, "too many digits"),
        ("[" * (MAX_DEPTH + 2), 1, "nested deeper"),
        ("[" * 200_000, 1, "nested deeper"),
        ("[" + "a," * (MAX_NODES + 1) + "]", 1, "values once aliases are expanded"),
        (BOMB, 5, "values once aliases are expanded"),
        ("%YAML 1.99999999999999999999999999\n--- a", 1, "cannot be parsed"),
    ],
)
def test_refused(text: str, line: int, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_text(text, "t.yaml")
    (problem,) = caught.value.problems
    assert problem.line == line
    assert message in problem.message
    assert problem.excerpt


def test_empty_and_missing_and_large_and_binary(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="empty"):
        parse_text("# nothing\n", "t")
    with pytest.raises(SpecError, match="cannot read"):
        read_file(tmp_path / "none.yaml")
    with pytest.raises(SpecError, match="cannot read"):
        read_file(tmp_path)
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(SpecError, match="too large"):
        read_file(large)
    large.write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(SpecError) as caught:
        read_file(large)
    assert caught.value.problems[0].line == 2


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(PLAIN)
@settings(deadline=None)
def test_written_yaml_reads_back(value: object) -> None:
    text = to_yaml(value)
    assert parse_text(text, "t").plain() == value
    assert to_yaml(parse_text(text, "t").plain()) == text


def refusal(text: str) -> SpecError | None:
    try:
        parse_text(text, "t.yaml").plain()
    except SpecError as error:
        return error
    return None


@given(st.text(st.characters(codec="utf-8"), max_size=60))
@settings(deadline=None)
def test_any_text_is_read_or_refused_with_a_line(text: str) -> None:
    error = refusal(text)
    assert error is None or "empty" in error.what or error.problems[0].line >= 1
