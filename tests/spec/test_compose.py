"""`extends`, `vars` and `--set`: how they merge, and what they refuse."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from fxcompress.errors import SpecError
from fxcompress.spec import Spec

Load = Callable[..., Spec]
BASE = """\
fxcompress: 1
model: {factory: "model.py:build", args: {width: 4, depth: 2}}
inputs: [{name: x, shape: [batch, 3]}]
vars: {ratio: 50%}
passes:
  - {use: tidy.fold}
  - {use: prune.channels, id: shrink, keep: "${vars.ratio}", round_to: 4, targets: [a, b]}
"""


def test_maps_merge_lists_replace_passes_merge_by_id(load: Load, folder: Path) -> None:
    (folder / "base.yaml").write_text(BASE)
    spec = load(
        "extends: base.yaml\n"
        "model: {args: {width: 8}}\n"
        "vars: {ratio: 25%}\n"
        "passes:\n"
        "  - {id: shrink, targets: [c], round_to: 8}\n"
        "  - {id: fold, skip: true}\n"
        "  - {use: tidy.fold}\n"
    )
    assert spec.plain()["model"]["args"] == {"width": 8, "depth": 2}
    assert spec.plain()["passes"] == [
        {"use": "tidy.fold", "id": "fold", "skip": True},
        {
            "use": "prune.channels",
            "id": "shrink",
            "keep": "25%",
            "round_to": 8,
            "targets": ["c"],
        },
        {"use": "tidy.fold", "id": "fold_2"},
    ]
    assert [step.id for step in spec.steps] == ["shrink", "fold_2"]
    assert [path.name for path in spec.files] == ["spec.yaml", "base.yaml"]
    assert spec.where("passes", 1, "keep").endswith("spec.yaml:3")
    assert spec.where("inputs").endswith("base.yaml:3")


def test_another_kind_replaces_a_block(load: Load, folder: Path) -> None:
    (folder / "base.yaml").write_text(BASE)
    spec = load("extends: base.yaml\nmodel: {timm: resnet18}\n")
    assert spec.plain()["model"] == {"timm": "resnet18"}
    spec = load("extends: base.yaml\npasses: [{id: shrink, use: tidy.fold}]\n")
    assert spec.plain()["passes"][1] == {"use": "tidy.fold", "id": "shrink"}


def test_several_bases_lie_on_top_of_each_other(load: Load, folder: Path) -> None:
    (folder / "base.yaml").write_text(BASE)
    (folder / "more.yaml").write_text("seed: 3\nname: more\n")
    spec = load("extends: [base.yaml, more.yaml]\nname: own\n")
    assert (spec.seed, spec.name) == (3, "own")


def test_paths_of_a_base_hold_from_the_root(load: Load, folder: Path) -> None:
    inner = folder / "inner"
    inner.mkdir()
    (inner / "model.py").write_text("def other(): ...\n")
    (inner / "w.safetensors").touch()
    (inner / "e.npz").touch()
    (inner / "base.yaml").write_text(
        'fxcompress: 1\nmodel: {factory: "model.py:other", weights: w.safetensors}\n'
        "data: {eval: {tensors: e.npz}}\n"
    )
    spec = load("extends: inner/base.yaml\n")
    assert spec.plain()["model"] == {
        "factory": "inner/model.py:other",
        "weights": "inner/w.safetensors",
    }
    assert spec.plain()["data"]["eval"]["tensors"] == "inner/e.npz"


@pytest.mark.parametrize("kind", ["spec", "run", "outputs"])
def test_a_teacher_of_a_base_holds_from_the_root(folder: Path, kind: str) -> None:
    inner = folder / "inner"
    inner.mkdir()
    (inner / "model.py").write_text("def other(): ...\n")
    (inner / "base.yaml").write_text(
        'fxcompress: 1\nmodel: {factory: "model.py:other"}\ndata: {factory: "model.py:other"}\n'
        f"passes: [{{use: train.fit, steps: 1, teacher: {{{kind}: ../large}},"
        " losses: [{use: soft_labels}]}]\n"
    )
    (folder / "root.yaml").write_text("extends: inner/base.yaml\n")
    (step,) = Spec.load(folder / "root.yaml").plain()["passes"]
    assert step["teacher"] == {kind: "inner/../large"}


def test_a_cycle_is_refused(load: Load, folder: Path) -> None:
    (folder / "a.yaml").write_text("extends: b.yaml\n")
    (folder / "b.yaml").write_text("extends: spec.yaml\n")
    with pytest.raises(SpecError) as caught:
        load("extends: a.yaml\n")
    (problem,) = caught.value.problems
    assert "spec.yaml → a.yaml → b.yaml → spec.yaml" in problem.message
    assert problem.file.endswith("b.yaml")
    assert problem.line == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: bas.yaml", "there is no file bas.yaml"),
        ("extends: 3", "should be the path of a spec"),
        ("extends: [base.yaml, {}]", "should be the path of a spec"),
        ("extends: list.yaml", "a spec is a mapping"),
    ],
)
def test_extends_refuses(load: Load, folder: Path, text: str, message: str) -> None:
    (folder / "base.yaml").write_text(BASE)
    (folder / "list.yaml").write_text("- 1\n")
    with pytest.raises(SpecError, match=message) as caught:
        load(text)
    assert caught.value.problems[0].line == 1


def test_a_problem_in_a_base_names_the_base(load: Load, folder: Path) -> None:
    (folder / "base.yaml").write_text(BASE.replace("round_to: 4", "rond_to: 4"))
    with pytest.raises(SpecError) as caught:
        load("extends: base.yaml\nname: x\n")
    (problem,) = caught.value.problems
    assert problem.file.endswith("base.yaml")
    assert problem.line == 7


def test_variables_keep_their_type(load: Load) -> None:
    text = BASE.replace("targets: [a, b]", 'targets: "${vars.names}"').replace(
        "width: 4", 'width: "${vars.w}", label: "w=${vars.w} ${vars.flag} ${vars.none}"'
    )
    spec = load(text, "vars.w=12", "vars.flag=true", "vars.names=[a, b]", "vars.none=")
    plain = spec.plain()
    assert plain["model"]["args"] == {"width": 12, "label": "w=12 true null", "depth": 2}
    assert plain["passes"][1]["targets"] == ["a", "b"]


def test_a_bomb_of_variables_is_stopped(load: Load) -> None:
    names = "abcdefghijklmnop"
    doubled = [f"  {a}: '${{vars.{b}}}${{vars.{b}}}'\n" for a, b in pairwise(names)]
    block = "vars:\n  ratio: 50%\n" + "".join(doubled) + f"  p: {'x' * 100}\n"
    text = BASE.replace("vars: {ratio: 50%}\n", block).replace("[a, b]", '["${vars.a}"]')
    with pytest.raises(SpecError) as caught:
        load(text)
    assert any("too" in p.message for p in caught.value.problems)


def test_set_reaches_every_place(load: Load, folder: Path) -> None:
    spec = load(
        BASE,
        "passes.shrink.keep=10%",
        "passes.0.skip=true",
        'passes.shrink.layers."layer1.conv"=3',
        "inputs.x.dtype=float16",
        "passes.shrink.targets.1=z",
        "model.args={width: 5}",
        "constraints.size=20MiB",
    )
    plain = spec.plain()
    assert plain["passes"][0]["skip"] is True
    assert plain["passes"][1]["keep"] == "10%"
    assert plain["passes"][1]["layers"] == {"layer1.conv": 3}
    assert plain["passes"][1]["targets"] == ["a", "z"]
    assert plain["inputs"][0]["dtype"] == "float16"
    assert plain["model"]["args"] == {"width": 5}
    assert spec.constraints.size is not None
    assert spec.constraints.size.value == 20 * 2**20


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("passes.shrnk.keep=1", "no step `shrnk`", "did you mean `shrink`?"),
        ("passes.7.keep=1", "no step `7`", "`fold`"),
        ("seed", "KEY=VALUE", "e.g."),
        ("=3", "KEY=VALUE", ""),
        ("a..b=3", "KEY=VALUE", ""),
        ("seed=[", "while parsing", ""),
        ("seed=x", "whole number", ""),
        ("sed=3", "unknown key", "`seed`"),
        ("model.factory.x=3", "is a value and has no `x`", ""),
        ("inputs.3.name=x", "no item `3`", "`x`"),
        ("passes.shrink.keep=", "should be a percentage", ""),
    ],
)
def test_set_refuses(load: Load, override: str, message: str, hint: str) -> None:
    with pytest.raises(SpecError) as caught:
        load(BASE, override)
    found = [p for p in caught.value.problems if message in p.message]
    assert found, str(caught.value)
    assert hint in found[0].hint
    assert found[0].file == f"--set {override}"
    assert found[0].line == 1
