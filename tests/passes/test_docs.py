"""Every pass has a page that names its options, and examples that are valid."""

import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel
from ruamel.yaml import YAML

from fxcompress.pipeline.catalog import catalog

PAGES = Path(__file__).parents[2] / "docs" / "passes"
INSTALLED = [name for name in catalog() if catalog().module(name).startswith("passes.")]


def option_names(model):
    for name, field in model.model_fields.items():
        if isinstance(field.default, BaseModel):
            yield from (f"{name}.{inner}" for inner in option_names(type(field.default)))
        else:
            yield name


@pytest.mark.parametrize("name", INSTALLED)
def test_the_page_names_every_option(name):
    text = (PAGES / f"{name}.md").read_text()
    rows = "\n".join(line for line in text.splitlines() if line.startswith("| `"))
    missing = [each for each in option_names(catalog()[name].Options) if f"`{each}`" not in rows]
    assert not missing
    assert text.startswith(f"# {name}\n")
    assert f"`{catalog()[name].preserves}`" in text


@pytest.mark.parametrize("name", INSTALLED)
def test_the_examples_are_valid(name):
    text = (PAGES / f"{name}.md").read_text()
    examples = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert examples
    for example in examples:
        for step in YAML(typ="safe", pure=True).load(example)["passes"]:
            pass_class = catalog().find(step.pop("use"))
            step.pop("id", None)
            pass_class.Options.model_validate_json(json.dumps(step))


def test_every_page_is_of_a_pass():
    assert {path.stem for path in PAGES.glob("*.md")} == set(INSTALLED)
