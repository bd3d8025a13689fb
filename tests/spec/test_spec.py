"""A valid spec, and every problem of a bad one at its place."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fxcompress.errors import Problem, SpecError
from fxcompress.pipeline.catalog import Catalog
from fxcompress.spec import Spec
from fxcompress.spec._steps import parse_options
from fxcompress.spec._yaml import parse_text
from fxcompress.spec.units import Amount

Load = Callable[..., Spec]


def problems(load: Load, text: str, *overrides: str) -> tuple[Problem, ...]:
    with pytest.raises(SpecError) as caught:
        load(text, *overrides)
    return caught.value.problems


def test_a_valid_spec(load: Load, folder: Path) -> None:
    spec = load()
    assert [(s.id, s.use, s.where) for s in spec.steps] == [
        ("fold", "tidy.fold", f"{folder}/spec.yaml:9"),
        ("shrink", "prune.channels", f"{folder}/spec.yaml:10"),
        ("static", "static", f"{folder}/spec.yaml:16"),
    ]
    options: Any = spec.steps[1].options
    assert options.targets == ("layer*.conv1",)
    assert options.budget.macs == Amount(0.4, True, "40%")
    assert options.model_dump(mode="json")["budget"] == {"macs": "40%", "parameters": None}
    assert spec.title == "small"
    assert spec.where("passes", 1, "round_to") == f"{folder}/spec.yaml:15"
    assert spec.constraints.metric is not None


def test_resolved_yaml_is_stable_and_reads_back(load: Load, passes: Catalog) -> None:
    spec = load()
    text = spec.resolved_yaml()
    again = Spec.parse(parse_text(text, "t").plain(), passes=passes)
    assert again.resolved_yaml() == text
    assert again == spec
    assert hash(again) == hash(spec)
    assert "vars" not in text
    assert "id: fold" in text


def test_a_literal_dollar_survives(load: Load, passes: Catalog) -> None:
    spec = load(VALID_TINY.replace("width: 4", 'width: "$${x}"'))
    assert spec.model.args == {"width": "${x}"}  # type: ignore[union-attr]
    again = Spec.parse(parse_text(spec.resolved_yaml(), "t").plain(), passes=passes)
    assert again.model == spec.model


def test_digest_covers_the_factory_and_what_it_imports(load: Load, folder: Path) -> None:
    (folder / "model.py").write_text("from helper import build\n")
    (folder / "helper.py").write_text("def build(width=4): ...\n")
    first = load().digest
    assert load().digest == first
    (folder / "helper.py").write_text("def build(width=5): ...\n")
    assert load().digest != first


VALID_TINY = """\
fxcompress: 1
model: {factory: "model.py:build", args: {width: 4}}
"""

CASES = [
    # text added to VALID_TINY, line, key, message, hint
    ("outputs: x", 3, "outputs", "unknown key", "did you mean `output`?"),
    ("passes: [{use: prune.chanels}]", 3, "passes[0].use", "unknown pass", "`prune.channels`"),
    ("passes: [{use: channels}]", 3, "passes[0].use", "unknown pass", "`prune.channels`"),
    (
        "passes: [{use: prune.channels, layers: 0}]",
        3,
        "passes[0].layers",
        "greater than or equal to 1",
        "",
    ),
    ("passes: [tidy.fold]", 3, "passes[0]", "should be a mapping", "write `use: tidy.fold`"),
    ("passes: tidy.fold", 3, "passes", "should be a list", ""),
    ("passes: [{id: x}]", 3, "passes[0]", "`use` is missing", ""),
    ("passes: [{us: tidy.fold}]", 3, "passes[0]", "`use` is missing", ""),
    ("passes: [{use: tidy.fold, id: a/b}]", 3, "passes[0].id", "names a folder", ""),
    (
        "passes: [{use: tidy.fold, id: a},\n  {use: tidy.fold, id: a}]",
        4,
        "passes[1].id",
        "second step",
        "",
    ),
    ("passes: [{use: tidy.fold, x: 1}]", 3, "passes[0].x", "unknown key", ""),
    (
        "passes: [{use: prune.channels, criterion: tailor}]",
        3,
        "passes[0].criterion",
        "unknown value 'tailor'",
        "did you mean `taylor`?",
    ),
    (
        "passes: [{use: prune.channels, budget: {mac: 1}}]",
        3,
        "passes[0].budget.mac",
        "unknown key",
        "did you mean `macs`?",
    ),
    (
        "passes: [{use: prune.channels, score: {use: taylor, samles: 4}}]",
        3,
        "passes[0].score",
        "`samples` is missing",
        "did you mean `samles`?",
    ),
    (
        "passes: [{use: prune.channels, score: {use: l2}}]",
        3,
        "passes[0].score",
        "unknown `l2`",
        "known: `l1`, `taylor`",
    ),
    (
        "passes: [{use: prune.channels, score: {use: taylor, samples: many}}]",
        3,
        "passes[0].score.samples",
        "should be a whole number, not 'many'",
        "",
    ),
    (
        "passes: [{use: prune.channels, layers: {a.b: x}}]",
        3,
        "passes[0].layers.a.b",
        "should be a whole number",
        "",
    ),
    ("passes: [{use: prune.channels, round_to: 0}]", 3, "passes[0].round_to", "greater", ""),
    ("passes: [{use: prune.channels, keep: 50}]", 3, "passes[0].keep", "write 50%", ""),
    ("passes: [{use: static}]", 3, "passes[0]", "needs a split `calibration`", ""),
    ("constraints: {size: 25}", 3, "constraints.size", "needs a unit", ""),
    ("constraints: {size: 25 MB, macs: 3 Mib}", 3, "constraints.macs", "unknown unit `Mib`", ""),
    ("constraints: {size: 3mib}", 3, "constraints.size", "did you mean `MiB`", ""),
    ("constraints: {metric: {}}", 3, "constraints.metric", "needs `min` or `max`", ""),
    ("constraints: {metric_drop: 1%}", 3, "constraints.metric_drop", "has no `metric`", ""),
    ("constraints: {latency: -3ms}", 3, "constraints.latency", "negative", ""),
    ("constraints: {cosine: .nan}", 3, "constraints.cosine", "not nan", ""),
    ("emit: [pt2, onxn]", 3, "emit[1]", "unknown `onxn`", "did you mean `onnx`?"),
    ("emit: [{use: onnx, stem: ../x}]", 3, "emit[0].stem", "inside the run folder", ""),
    ("emit: [{use: onnx, stem: /x}]", 3, "emit[0].stem", "inside the run folder", ""),
    ("emit: [{use: onnx, opsett: 20}]", 3, "emit[0].opsett", "unknown key", "`opset`"),
    ("emit: [pt2, pt2]", 3, "emit[1]", "twice", ""),
    ("emit: pt2", 3, "emit", "should be a list", ""),
    ("metric: acuracy", 3, "metric", "unknown value 'acuracy'", "did you mean `accuracy`?"),
    ("metric: {split: eval}", 3, "metric", "needs exactly one of `use`, `factory`", ""),
    ("inputs: [{name: x, shape: [a, 3.5]}]", 3, "inputs[0].shape[1]", "should be a size", ""),
    (
        "inputs: [{name: x, shape: [1]}, {name: x, shape: [1]}]",
        3,
        "inputs[1].name",
        "second input",
        "",
    ),
    (
        "inputs: [{name: x, shape: [b], dtype: floot32}]",
        3,
        "inputs[0].dtype",
        "unknown",
        "`float32`",
    ),
    (
        "inputs: [{name: x, shape: [b], values: randint(5)}]",
        3,
        "inputs[0].values",
        "randint(low, high)",
        "",
    ),
    (
        "inputs: [{name: x, shape: [batch, 3]}]\ndims: {bach: {min: 2}}",
        4,
        "dims.bach",
        "no input has this dim",
        "`batch`",
    ),
    (
        "inputs: [{name: x, shape: [b]}]\ndims: {b: {min: 3, max: 2}}",
        4,
        "dims.b",
        "`min` 3 is above",
        "",
    ),
    (
        "data: {eval: {random: 4, tensors: x.npz}}",
        3,
        "data.eval",
        "exactly one of",
        "",
    ),
    ('data: {factory: "data.py:split"}', 3, "data.factory", "has no `split`", "`splits`"),
    ('data: {factory: "dat.py:splits"}', 3, "data.factory", "no file dat.py", "`data.py:splits`"),
    ('data: {factory: "a b:c"}', 3, "data.factory", "file.py:function", ""),
    ("data: {eval: {tensors: e.npz}}", 3, "data.eval.tensors", "no file e.npz", ""),
    ("capture: {tracer: exprot}", 3, "capture.tracer", "unknown value", "did you mean `export`?"),
    ("capture: {static: [batch]}", 3, "capture.static[0]", "no input has a dim", ""),
    ("seed: 1.5", 3, "seed", "should be a whole number, not 1.5", ""),
    ("name: a/b", 3, "name", "pattern", ""),
    ("vars: {x: 1}", 3, "vars.x", "used nowhere", ""),
    ("name: ${vars.nme}\nvars: {nam: 1}", 3, "name", "is not defined", "did you mean `nam`?"),
    ("name: ${env.HOME}", 3, "name", "is not a variable", ""),
    ("name: ${vars.a}\nvars: {a: '${vars.a}'}", 4, "vars.a", "defined by itself", ""),
]


@pytest.mark.parametrize(("text", "line", "key", "message", "hint"), CASES)
def test_a_problem_is_told_at_its_place(
    load: Load, text: str, line: int, key: str, message: str, hint: str
) -> None:
    found = problems(load, VALID_TINY + text)
    match = [p for p in found if p.key == key and message in p.message]
    assert match, [str(p) for p in found]
    assert match[0].line == line
    assert match[0].file.endswith("spec.yaml")
    assert hint in match[0].hint
    assert "^" in match[0].excerpt
    assert "function-" not in str(match[0])


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        ("fxcompress: 2\nmodel: timm:resnet18", "fxcompress", "should be 1"),
        ("fxcompress: 1", "", "`model` is missing"),
        ("fxcompress: 1\nmodel: {}", "model", "needs one of: `factory`"),
        ("fxcompress: 1\nmodel: {timm: 3}", "model.timm", "should be text, not 3"),
        ("fxcompress: 1\nmodel: {timm: a, wights: b}", "model.wights", "unknown key"),
        ("fxcompress: 1\nmodel: {factory: a.py:b, hf: x}", "model.hf", "unknown key"),
        ("fxcompress: 1\nmodel: {program: x.fxp, weights: y}", "model.weights", "unknown key"),
        ("fxcompress: 1\nmodel: nothing", "model", "file.py:function"),
        ("fxcompress: 1\nmodel: 3", "model", "needs one of"),
        ("fxcompress: 1\nmodel: hf:nowhere", "model", "there is no file nowhere"),
        ("fxcompress: 1\nmodel: {program: a.fxp}", "model.program", "there is no file a.fxp"),
        ("- 1", "", "a spec is a mapping"),
    ],
)
def test_the_model_block(load: Load, text: str, key: str, message: str) -> None:
    found = problems(load, text)
    assert [p for p in found if p.key == key and message in p.message], [str(p) for p in found]


def test_all_problems_at_once_in_order(load: Load) -> None:
    found = problems(load, VALID_TINY + "nam: x\nseed: a\nemit: [x]\npasses: [{use: y}]\n")
    assert [p.line for p in found] == [3, 4, 5, 6]


def test_a_union_blames_the_branch_that_was_meant(load: Load) -> None:
    found = problems(load, "fxcompress: 1\nmodel: {hf: {a: 1}, clas: X}")
    assert [p.key for p in found] == ["model.clas"]
    assert "`class`" in found[0].hint


def test_skip_leaves_a_step_out_but_still_checks_it(load: Load) -> None:
    spec = load(VALID_TINY + "passes: [{use: tidy.fold, skip: true}, {use: tidy.fold}]")
    assert [step.id for step in spec.steps] == ["fold_2"]
    assert problems(load, VALID_TINY + "passes: [{use: tidy.fold, skip: true, x: 1}]")


def test_parse_takes_plain_values(passes: Catalog, folder: Path) -> None:
    values = {"fxcompress": 1, "model": "timm:resnet18", "passes": ({"use": "tidy.fold"},)}
    spec = Spec.parse(values, folder=folder, passes=passes)
    assert [step.id for step in spec.steps] == ["fold"]
    with pytest.raises(SpecError, match="holds no set"):
        Spec.parse({"fxcompress": {1}}, passes=passes)
    with pytest.raises(SpecError, match="unknown key"):
        Spec.parse({**values, "extends": "x.yaml"}, passes=passes)


def test_options_from_plain_values(passes: Catalog) -> None:
    options = parse_options(passes["prune.channels"], {"targets": ["a"], "keep": "25%"})
    assert options.model_dump()["keep"] == 0.25
    with pytest.raises(SpecError, match="did you mean `targets`"):
        parse_options(passes["prune.channels"], {"tragets": ["a"]})


def test_loading_a_spec_imports_no_torch() -> None:
    code = (
        "import sys; from fxcompress.spec import Spec; import fxcompress.pipeline\n"
        "s = Spec.parse({'fxcompress': 1, 'model': 'timm:x'}); s.resolved_yaml(); s.digest\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_equality_is_by_content(load: Load) -> None:
    one = load(VALID_TINY)
    two = load(VALID_TINY.replace("args: {width: 4}", "args: {width: 5}"))
    assert one != two
    assert one != "spec"
    assert isinstance(one.plain(), Mapping)
