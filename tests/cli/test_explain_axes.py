"""`fxcompress explain` on axes: parameters, dimensions, pairs, and what cannot shrink."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Call


def test_a_node_tells_its_terms_and_what_shrinks_with_it(call: Call, folder: Path) -> None:
    said = call("explain", "spec.yaml", "conv")
    assert said.code == 0, said.err
    assert "conv.weight  4 = a × 1 × 3 × 3" in said.out
    assert "a = conv.weight[0]  channel, 4" in said.out
    assert "bn: scales weight[0]; shifts bias[0]" in said.out
    assert "fc: reads weight[1]" in said.out
    assert "3, 3: a kernel's positions\n      conv.weight[2] → conv" in said.out


def test_a_dimension_that_cannot_shrink_has_its_way(call: Call, folder: Path) -> None:
    said = call("explain", "spec.yaml", "fc.weight[0]")
    assert "3: it is a size of the model's output\n      fc.weight[0] → fc → output" in said.out
    assert "a = " not in said.out


def test_a_product_is_written_in_letters(call: Call, folder: Path) -> None:
    out = call("explain", "spec.yaml", "fc.weight[1]").out
    assert "fc.weight  16 = a·" in out


def test_two_names_are_coupled_or_not(call: Call, folder: Path) -> None:
    said = call("explain", "spec.yaml", "conv.weight[0]", "fc.weight")
    assert "shrinks with fc.weight: conv.weight[0]" in said.out
    assert "conv.weight[0] → conv → bn → /relu → /flatten → fc → fc.weight[1]" in said.out
    said = call("explain", "spec.yaml", "conv.weight[0]", "fc.weight[0]")
    assert "independent of fc.weight[0]" in said.out


def test_the_document_has_all_of_it(call: Call, folder: Path) -> None:
    document = call("explain", "spec.yaml", "conv.weight[0]", "bn", "--format", "json").document
    [axis] = document["axes"]["axes"]
    assert (axis["name"], axis["kind"], axis["size"]) == ("conv.weight[0]", "channel", 4)
    assert {each["role"] for each in axis["coupled"]} >= {"out", "in", "scale", "bias"}
    assert document["coupling"]["path"] == ["conv.weight[0]", "conv", "bn"]


def test_a_run_explains_its_original(call: Call, folder: Path) -> None:
    assert call("run", "spec.yaml", "-o", "out").code == 0
    said = call("explain", "out", "bn.weight")
    assert "bn.weight  4 = a" in said.out
    assert "1 fold\n  - bn" in said.out


@pytest.mark.parametrize(("name", "hint"), [("fc.wieght", "`fc.weight`"), ("con", "`conv`")])
def test_unknown_names_are_refused_with_a_hint(
    call: Call, folder: Path, name: str, hint: str
) -> None:
    wrong = call("explain", "spec.yaml", name)
    assert wrong.code == 2
    assert f"did you mean {hint}" in wrong.err
    assert call("explain", "spec.yaml", "conv", name).code == 2
