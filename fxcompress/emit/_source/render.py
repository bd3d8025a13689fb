"""Put classes into the template: one Python file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import jinja2

from fxcompress.emit._source.classes import ClassSource
from fxcompress.emit._source.layout import space_slices, wrap

__all__ = ["render"]

_HELPERS: Final = (
    "CodebookWeight", "DynamicQuantize", "Exit", "Experts", "FakeQuantize", "Float8Rounding",
    "Float8Weight", "Int8Conv1d", "Int8Conv2d", "Int8Conv3d", "Int8Linear", "IntegerWeight",
    "PackedWeight", "RoundedRecurrent",
    "Signs", "StochasticDepth", "TopTokens", "Undecided",
)  # fmt: skip
# What an import is needed for, and the import, in the order of the file.
_IMPORTS: Final = (
    (r"\bjson\.", "import json"),
    (r"\bmath\.", "import math"),
    (r"\boperator\.", "import operator"),
    (r"\bOrderedDict\(", "from collections import OrderedDict"),
    (r"\bFraction\(", "from fractions import Fraction"),
    (r"\bPath\b", "from pathlib import Path"),
    (r"\bAny\b", "from typing import Any"),
    (r"", ""),
    (r"", "import torch"),
    (r"\bF\.", "import torch.nn.functional as F"),
    (r"", "from torch import Tensor, nn"),
)  # fmt: skip


def render(
    classes: Sequence[ClassSource],
    constants: Mapping[str, str],
    facts: Mapping[str, Any],
) -> str:
    """Return the source.

    Args:
        classes: In the order of definition; the last is the model.
        constants: Module-level names and their values as source: DTYPES, TIED.
        facts: What the template's docstring tells: title, version, usage, weights, hashes.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fxcompress.emit._source", "templates"),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        keep_trailing_newline=False,
    )
    views = [_view(cls) for cls in classes]
    text = "\n".join(f"{v['constructor']}\n{v['forward']}" for v in views)
    helpers = [
        environment.get_template(f"{name}.jinja").render()
        for name in _HELPERS
        if re.search(rf"\b{name}\(", text)
    ]
    loader = environment.get_template("loader.jinja").render(
        model=classes[-1].name, weights=facts["weights"], tied="TIED" in constants
    )
    everything = "\n".join([text, loader, *helpers])
    imports = [line for pattern, line in _IMPORTS if re.search(pattern, everything)]
    made = environment.get_template("model.py.jinja").render(
        **facts,
        imports=[*imports, *_constants(constants)],
        helpers=helpers,
        classes=views,
        loader=loader,
    )
    return made.rstrip() + "\n"


def _constants(constants: Mapping[str, str]) -> list[str]:
    lines: list[str] = [""] if constants else []
    for name, value in constants.items():
        lines.extend(wrap(f"{name} = {value}", 0))
    return lines


def _view(cls: ClassSource) -> dict[str, str]:
    arguments = "".join(f", {name}: {annotation}" for name, annotation in cls.arguments)
    constructor = [*_header(f"def __init__(self{arguments}) -> None:")]
    for line in cls.constructor:
        constructor.extend(wrap(line, 8))
    return {
        "name": cls.name,
        "base": cls.base,
        "doc": cls.doc,
        "constructor": "\n".join(constructor),
        "forward": "\n".join(_forward(cls)),
    }


def _header(line: str) -> list[str]:
    return wrap(line, 4)


def _forward(cls: ClassSource) -> list[str]:
    if cls.result is None:
        return []
    parameters = "".join(
        f", {name}: {annotation}" if annotation else f", {name}"
        for name, annotation in cls.parameters
    )
    lines = _header(f"def forward(self{parameters}) -> {_result_type(cls.result)}:")
    for line in cls.body:
        inner = len(line) - len(line.lstrip())
        lines.extend(wrap(space_slices(line.lstrip()), 8 + inner))
    lines.extend(wrap(space_slices(f"return {cls.result}"), 8))
    return lines


def _result_type(result: str) -> str:
    if result.startswith("{"):
        return "dict[str, Any]"
    if result.startswith("["):
        return "list[Any]"
    return "Any" if _is_tuple(result) else "Tensor"


def _is_tuple(result: str) -> bool:
    depth = 0
    for index, char in enumerate(result):
        depth += char in "([{"
        depth -= char in ")]}"
        if char == "," and (depth == 0 or (depth == 1 and result[0] == "(" and index)):
            whole = depth == 0 or result.endswith(")")
            return whole and (depth == 0 or _closes_at_end(result))
    return False


def _closes_at_end(result: str) -> bool:
    depth = 0
    for index, char in enumerate(result):
        depth += char in "([{"
        depth -= char in ")]}"
        if depth == 0:
            return index == len(result) - 1
    return False
