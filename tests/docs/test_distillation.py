"""The page on distillation: its test runs, and its options and teachers are those there are."""

import re
from pathlib import Path

from fxcompress.train.joint import ProjectorConfig

PAGE = (Path(__file__).parents[2] / "docs" / "distillation.md").read_text(encoding="utf-8")


def test_the_example_runs() -> None:
    [(_, source)] = re.findall(r"```python file=(\S+)\n(.*?)```", PAGE, re.S)
    names: dict[str, object] = {}
    exec(compile(source, "distillation.md", "exec"), names)
    test = names["test_a_joint_graph"]
    assert callable(test)
    test()


def test_the_options_of_projectors_are_those_there_are() -> None:
    table = PAGE.split("| option of `projectors`")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.M) == list(ProjectorConfig.model_fields)
