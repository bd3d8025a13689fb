"""The JSON Schema of specs, for editors: `enum` and `if`/`then` per pass.

Unions are not written as `oneOf`, since a validator can then only say that nothing matched; with
`if`/`then` the message is about the branch that was meant.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from fxcompress.pipeline.catalog import Catalog, catalog
from fxcompress.spec import models
from fxcompress.spec._explain import field_names

__all__ = ["json_schema", "schema_text"]

DIALECT = "http://json-schema.org/draft-07/schema#"
_VARIABLE = r"^\$\{"
_STEP: dict[str, dict[str, Any]] = {
    "use": {"description": "The pass."},
    "id": {
        "type": "string",
        "description": "Names the step in overrides, checkpoints and reports; by default the last "
        "part of `use`.",
    },
    "skip": {"type": "boolean", "default": False, "description": "Leave this step out."},
}


def json_schema(passes: Catalog | None = None) -> dict[str, Any]:
    """Return the JSON Schema (draft 7) of a spec with the given or the installed passes."""
    known = catalog() if passes is None else passes
    schema = _schema_of(models.Blocks)
    definitions: dict[str, Any] = schema.pop("$defs")
    step, step_definitions = _steps(known)
    properties = schema["properties"]
    properties["model"] = _by_key(properties["model"], models.MODEL_KINDS)
    properties["data"] = _data(properties["data"])
    properties["metric"] = _metric(properties["metric"])
    properties["emit"]["items"] = _or_object(properties["emit"]["items"])
    properties["passes"] = {
        "type": "array",
        "description": "The passes, in the order they are applied.",
        "items": step,
    }
    properties["extends"] = {
        "description": "Specs to start from: maps merge, lists replace, passes merge by id.",
        "type": ["string", "array"],
        "items": {"type": "string"},
    }
    properties["vars"] = {
        "description": "Values for `${vars.NAME}`.",
        "type": "object",
    }
    required = schema.pop("required")
    whole = {
        "$schema": DIALECT,
        "title": "fxcompress spec",
        **{key: value for key, value in schema.items() if key != "title"},
        "if": {"not": {"required": ["extends"]}},
        "then": {"required": required, "properties": {"model": _one_of(models.MODEL_KINDS)}},
        "definitions": {**definitions, **step_definitions},
    }
    finished: dict[str, Any] = _finish(whole)
    return finished


def schema_text(passes: Catalog | None = None) -> str:
    """Return the schema as the text of a file, the same bytes each time."""
    return json.dumps(json_schema(passes), indent=2, ensure_ascii=False) + "\n"


def _schema_of(model: type[BaseModel]) -> dict[str, Any]:
    schema = model.model_json_schema(by_alias=True)
    schema.setdefault("$defs", {})
    return schema


def _steps(known: Catalog) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the schema of one step, and the definitions that it needs."""
    models = {name: known[name].Options for name in known}
    # All at once: what several passes share is generated, and stands, once.
    references, schema = models_json_schema([(each, "validation") for each in models.values()])
    inner: dict[str, Any] = schema.get("$defs", {})
    own = {name: _name_in(references[each, "validation"]["$ref"]) for name, each in models.items()}
    nested = set(inner) - set(own.values()) | _named(list(inner.values()))
    definitions = {f"passes.{each}": _placed(inner[each]) for each in inner if each in nested}
    branches = []
    for name in known:
        options = _placed(inner[own[name]])
        options["properties"] = {**dict.fromkeys(_STEP, True), **options.get("properties", {})}
        options.pop("title", None)
        # In a spec that extends another, a step may give only what it changes.
        required = options.pop("required", [])
        definitions[f"passes.{name}"] = options
        then: dict[str, Any] = {"$ref": f"#/definitions/passes.{name}"}
        then = {"allOf": [then, {"required": required}]} if required else then
        branches.append({"if": _is("use", name), "then": then})
    step = {
        "type": "object",
        "properties": {**_STEP, "use": {"enum": list(known), **_STEP["use"]}},
        "anyOf": [{"required": ["use"]}, {"required": ["id"]}],
        "allOf": branches,
    }
    return step, definitions


def _is(key: str, value: str) -> dict[str, Any]:
    return {"type": "object", "required": [key], "properties": {key: {"const": value}}}


def _name_in(value: Any) -> str:
    """Return the name of the definition that a text refers to; empty where it is no reference."""
    prefix = "#/$defs/"
    found = isinstance(value, str) and value.startswith(prefix)
    return value[len(prefix) :] if found else ""


def _named(value: Any) -> set[str]:
    """Return the names of the definitions that a schema refers to."""
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return {name for part in parts for name in _named(part)}
    return {_name_in(value)} - {""}


def _placed(value: Any) -> Any:
    """Rewrite references to where the definitions of passes stand."""
    if isinstance(value, dict):
        return {key: _placed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_placed(item) for item in value]
    name = _name_in(value)
    return f"#/definitions/passes.{name}" if name else value


def _by_key(schema: Mapping[str, Any], kinds: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    """Return a union whose branch is told by the one key that it alone has."""
    branches = [
        {
            "if": {"type": "object", "required": [kind]},
            "then": {"$ref": f"#/$defs/{model.__name__}"},
        }
        for kind, model in kinds.items()
    ]
    return {
        "description": "A mapping with one of " + ", ".join(kinds) + "; or `timm:NAME`, "
        "`torchvision:NAME`, `file.py:function` as text.",
        "type": ["object", "string"],
        "propertyNames": {"enum": sorted({key for m in kinds.values() for key in field_names(m)})},
        "allOf": branches,
    }


def _one_of(keys: Iterable[str]) -> dict[str, Any]:
    """Demand one of the keys of a mapping; what extends another spec may leave it to the base."""
    return {"if": {"type": "object"}, "then": {"anyOf": [{"required": [key]} for key in keys]}}


def _data(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "description": "A factory that returns the splits, or splits by name.",
        "type": ["object", "string", "null"],
        "if": {
            "type": "object",
            "required": ["factory"],
            "properties": {"factory": {"type": "string"}},
        },
        "then": {"$ref": "#/$defs/DataFactory"},
        "else": {"additionalProperties": {"$ref": "#/$defs/Split"}},
        "default": schema.get("default"),
    }


def _metric(schema: Mapping[str, Any]) -> dict[str, Any]:
    theirs = {"use": {"type": "string", "pattern": "^torchmetrics"}}
    return {
        "description": "A built-in metric, one of torchmetrics, or `file.py:function`: as text or "
        "as a mapping.",
        "type": ["object", "string", "null"],
        "if": {"type": "object", "required": ["use"], "properties": theirs},
        "then": {"$ref": "#/$defs/TorchMetric"},
        "else": {"if": {"type": "object"}, "then": {"$ref": "#/$defs/Metric"}},
        "default": schema.get("default"),
    }


def _or_object(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tagged union that may also be written as its tag alone."""
    names = list(schema["discriminator"]["mapping"])
    text = {"if": {"type": "string"}, "then": {"enum": names}}
    return {"type": ["object", "string"], **text, "else": dict(schema)}


def _finish(value: Any) -> Any:
    """Turn tagged unions into `if`/`then`, let variables stand for numbers, and drop titles."""
    if isinstance(value, list):
        return [_finish(item) for item in value]
    if not isinstance(value, dict):
        return value.replace("#/$defs/", "#/definitions/") if isinstance(value, str) else value
    if "discriminator" in value and "oneOf" in value:
        value = _tagged(value)
    if "oneOf" in value:
        value = {"anyOf" if key == "oneOf" else key: item for key, item in value.items()}
    if value.get("type") in ("integer", "number", "boolean") and "const" not in value:
        value = {**value, "type": [value["type"], "string"], "pattern": _VARIABLE}
    return {
        key: _finish(item)
        for key, item in value.items()
        if not (key == "title" and isinstance(item, str) and "properties" not in value)
    }


def _tagged(value: Mapping[str, Any]) -> dict[str, Any]:
    tag, mapping = value["discriminator"]["propertyName"], value["discriminator"]["mapping"]
    rest = {k: v for k, v in value.items() if k not in {"oneOf", "discriminator"}}
    return {
        **rest,
        "type": "object",
        "required": [tag],
        "properties": {tag: {"enum": list(mapping)}},
        "allOf": [{"if": _is(tag, name), "then": {"$ref": ref}} for name, ref in mapping.items()],
    }
