"""The JSON Schema: current, and of one mind with the models."""

import json
import re
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import fastjsonschema
import pytest

from fxcompress.pipeline.catalog import GROUP, Catalog, catalog
from fxcompress.spec import json_schema
from fxcompress.spec._yaml import parse_text, read_file
from fxcompress.spec.schema import schema_text
from tests.train.losses.cases import CASES

ROOT = Path(__file__).parents[2]


def test_the_checked_in_schema_is_current() -> None:
    builtin = catalog([EntryPoint("builtin", "passes", GROUP)])
    assert (ROOT / "fxcompress.schema.json").read_text() == schema_text(builtin), "run: make schema"


@pytest.mark.parametrize("path", sorted(ROOT.glob("specs/*/*.yaml")), ids=lambda p: p.parent.name)
def test_the_examples_are_valid(path: Path) -> None:
    check(json.loads((ROOT / "fxcompress.schema.json").read_text()), read_file(path).plain())


def check(schema: dict[str, Any], document: object) -> None:
    fastjsonschema.validate(schema, document, use_default=False)


VALID = """\
fxcompress: 1
model: {factory: "model.py:build", args: {width: 4}}
inputs: [{name: x, shape: [batch, 3]}]
data: {eval: {random: 4}}
metric: accuracy
vars: {share: 40%}
passes:
  - {use: tidy.fold}
  - {use: prune.channels, id: shrink, budget: {macs: 50%}, round_to: "${vars.share}",
     score: {use: taylor, samples: 3}}
constraints: {metric_drop: 1.0%, size: 25%, metric: {min: 0.5}}
emit: [pt2, {use: onnx, opset: 20}]
"""


def test_the_schema_accepts_a_valid_spec(passes: Catalog) -> None:
    schema = json_schema(passes)
    check(schema, parse_text(VALID, "t").plain())
    check(schema, {"extends": "base.yaml", "passes": [{"id": "shrink", "round_to": 4}]})
    check(schema, {"fxcompress": 1, "model": "timm:resnet18"})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("fxcompress: 1", "fxcompress: 2"),
        ("args:", "arg:"),
        ("width: 4}}", "width: 4}, wights: x}"),
        ('factory: "model.py:build"', "fctory: x"),
        ("random: 4", "random: 0"),
        ("random: 4", "rndom: 4"),
        ("shape: [batch, 3]", "shape: 3"),
        ("metric: accuracy", "metric: {use: acuracy}"),
        ("use: tidy.fold", "use: tidy.fol"),
        ("use: tidy.fold", "use: tidy.fold, x: 1"),
        ("macs: 50%", "mac: 50%"),
        ("macs: 50%", "macs: 50 percent"),
        ("use: taylor", "use: tailor"),
        ("samples: 3", "samples: many"),
        ("samples: 3", "sample: 3"),
        ("size: 25%", "size: 25"),
        ("size: 25%", "sizes: 25%"),
        ("[pt2,", "[pt3,"),
        ("opset: 20", "opsett: 20"),
        ("vars:", "vrs:"),
    ],
)
def test_the_schema_refuses(passes: Catalog, old: str, new: str) -> None:
    assert old in VALID
    with pytest.raises(fastjsonschema.JsonSchemaException):
        check(json_schema(passes), parse_text(VALID.replace(old, new), "t").plain())


def test_what_passes_share_stands_once_and_equal_names_do_not_meet(passes: Catalog) -> None:
    assert "passes.Budget" in json_schema(passes)["definitions"]
    definitions = json_schema(catalog([EntryPoint("builtin", "passes", GROUP)]))["definitions"]
    assert [key for key in definitions if key.endswith(".SoftLabels")] == ["passes.SoftLabels"]
    # Models of one name that differ are told apart by their module.
    own = {key for key in definitions if key.endswith("Override")}
    assert len(own) > 1
    assert "passes.Override" not in own
    text = json.dumps(definitions)
    assert set(re.findall(r'"#/definitions/([^"]+)"', text)) <= set(definitions)
    assert "oneOf" not in text


def test_the_schema_is_of_one_mind_with_the_losses() -> None:
    schema = json_schema(catalog([EntryPoint("builtin", "passes", GROUP)]))
    valid = fastjsonschema.compile(schema, use_default=False)

    def spec(loss: dict[str, Any]) -> dict[str, Any]:
        step = {"use": "train.fit", "epochs": 1, "teacher": "original", "losses": [loss]}
        return {"fxcompress": 1, "model": "timm:resnet18", "passes": [step]}

    for case in CASES:
        valid(spec(case.options))
    for weight in (2, {"from": 1, "to": 0, "curve": "cosine"}, {"steps": [[0, 1], [0.5, 2]]}):
        valid(spec({"use": "mse", "weight": weight}))
    valid(spec({"use": "soft_labels", "top_k": {"from": 5, "until": 0.5}}))
    for wrong in ({"use": "rkd", "angel": 2}, {"use": "mse", "weight": {"from": 1}},
                  {"use": "features", "distance": "l3"}, {"use": "ctdk"},
                  {"use": "soft_labels", "top_k": {"from": 5, "till": 0.5}}):  # fmt: skip
        with pytest.raises(fastjsonschema.JsonSchemaException):
            valid(spec(wrong))
