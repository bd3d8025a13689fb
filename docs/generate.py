"""Write docs/spec-reference.md from the models that check specs: `make docs`."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fxcompress.pipeline import catalog
from fxcompress.spec import constraints, models

PAGE = Path(__file__).with_name("spec-reference.md")
BLOCKS: tuple[tuple[str, str, tuple[type[BaseModel], ...]], ...] = (
    ("model", "What is compressed. Exactly one kind; a text such as `timm:NAME` or "
     "`model.py:build` stands for the mapping.", tuple(models.MODEL_KINDS.values())),
    ("inputs", "A list: one entry per tensor that `forward` takes.", (models.Input,)),
    ("dims", "Ranges of the dynamic dims that `inputs` names, by name.", (models.DimRange,)),
    ("data", "One factory for all splits, or a mapping from split names to sources.",
     (models.DataFactory, models.Split, models.Images, models.Text)),
    ("metric", "What the model is judged by; a text names a built-in one.",
     (models.Metric, models.TorchMetric)),
    ("capture", "How the model is recorded.", (models.Capture,)),
    ("constraints", "What the result must reach. Percentages are of the original's figure; the run "
     "exits 4 if one is not met.", (constraints.Constraints, constraints.MetricLimit)),
    ("emit", "A list of formats, each a name or a mapping with `use`.",
     (models.EmitPt2, models.EmitOnnx, models.EmitOpenvino, models.EmitExecutorch,
      models.EmitPlain)),
)  # fmt: skip
HEAD = Path(__file__).with_name("spec-reference.head.md").read_text(encoding="utf-8")


def page() -> str:
    """Return the whole page."""
    return "\n".join([HEAD, *_blocks(), *_passes()]).rstrip() + "\n"


def _blocks() -> Iterator[str]:
    yield "## Blocks\n"
    yield from _table(models.Blocks)
    for name, text, parts in BLOCKS:
        yield f"\n### `{name}`\n\n{text}\n"
        for part in parts:
            if len(parts) > 1:
                yield f"**{_first(part)}**\n"
            yield from _table(part)
            yield ""


def _passes() -> Iterator[str]:
    yield "\n## Passes\n"
    for name, pass_ in catalog().items():
        yield f"### `{name}`\n"
        yield f"{_first(pass_)} Preserves: {pass_.preserves}." + (
            f" Needs the splits: {', '.join(sorted(pass_.needs))}." if pass_.needs else ""
        )
        yield ""
        yield from _table(pass_.Options)
        yield ""


def _first(thing: type) -> str:
    return " ".join((thing.__doc__ or "").strip().split("\n\n")[0].split())


def _table(model: type[BaseModel]) -> Iterator[str]:
    if not model.model_fields:
        yield "No options."
        return
    yield "| key | type | default | |\n|:--|:--|:--|:--|"
    for name, field in model.model_fields.items():
        text = " ".join((_description(field) or "").split()).replace("|", "\\|")
        key = field.alias or name
        yield f"| `{key}` | {_type(field.annotation)} | {_default(field)} | {text} |"


def _description(field: FieldInfo) -> str | None:
    if field.description:
        return field.description
    for item in _annotations(field.annotation):
        if isinstance(item, FieldInfo) and item.description:
            return item.description
    inner = [a for a in (field.annotation, *get_args(field.annotation)) if _is_model(a)]
    return _first(inner[0]) if inner else None


def _annotations(annotation: Any) -> list[Any]:
    return list(get_args(annotation)[1:]) if get_origin(annotation) is Annotated else []


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return "empty"
    default = field.default
    if default is PydanticUndefined or default is None or default == () or _is_model(type(default)):
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _type(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(args[0])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(a) for a in args if a is not type(None)))
    if origin is Literal:
        return ", ".join(f"`{arg}`" for arg in args)
    if origin in (tuple, list):
        return f"list of {_type(args[0])}" if args else "list"
    if origin is dict:
        return f"map from {_type(args[0])} to {_type(args[1])}"
    if _is_model(annotation):
        return "map"
    names = {str: "text", int: "integer", float: "number", bool: "true/false", typing.Any: "any"}
    known = names.get(annotation)
    return known or re.sub(r"(?<!^)(?=[A-Z])", " ", getattr(annotation, "__name__", "text")).lower()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
