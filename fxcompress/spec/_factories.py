"""How a spec names a Python callable and its arguments."""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, Field

__all__ = ["FACTORY", "Args", "Factory"]

FACTORY = re.compile(r"(?P<source>[^:]+\.py|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*)")
"""`file.py:function` beside the spec, or `package.module:callable`."""


def _factory(text: str) -> str:
    if not FACTORY.fullmatch(text):
        raise ValueError("should be `file.py:function` or `package.module:callable`")
    return text


Factory: TypeAlias = Annotated[
    str,
    Field(
        description="`file.py:function` beside the spec, or `package.module:callable`.",
        examples=["model.py:build", "torchvision.models:resnet18"],
    ),
    AfterValidator(_factory),
]
Args: TypeAlias = Annotated[
    dict[str, Any], Field(default_factory=dict, description="Keyword arguments of the call.")
]
