"""`fxcompress passes`: which passes there are, and what each one takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import rich_click as click

from fxcompress.cli._command import Outcome, document_options, emits

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from fxcompress.pipeline.catalog import Catalog

__all__ = ["command", "complete_pass"]


def complete_pass(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Complete the name of a pass."""
    from click.shell_completion import CompletionItem

    from fxcompress.pipeline.catalog import catalog

    return [CompletionItem(name) for name in catalog() if name.startswith(incomplete)]


@click.command("passes")
@click.argument("name", required=False, shell_complete=complete_pass)
@document_options
@emits
def command(name: str | None) -> Outcome:
    """List the installed passes, or say what one does and which options it takes."""
    from fxcompress.pipeline.catalog import catalog

    known = catalog()
    if name is not None:
        return _one(name, known)
    rows = [_row(each, known) for each in known]
    width = max((len(row["name"]) for row in rows), default=0)
    lines = [f"{row['name']:<{width}}  {row['preserves']:<11}  {row['summary']}" for row in rows]
    return Outcome("\n".join(lines) or "no passes are installed", {"passes": rows})


def _row(name: str, known: Catalog) -> dict[str, Any]:
    pass_class = known[name]
    return {
        "name": name,
        "module": known.module(name),
        "preserves": pass_class.preserves,
        "version": pass_class.version,
        "needs": sorted(pass_class.needs),
        "summary": _documentation(pass_class).partition("\n")[0],
    }


def _documentation(pass_class: type) -> str:
    """Return the docstring of a pass, or of its file."""
    module = inspect.getmodule(pass_class)
    return inspect.cleandoc(pass_class.__doc__ or (module.__doc__ if module else "") or "")


def _one(name: str, known: Catalog) -> Outcome:
    pass_class = known.find(name)
    row = _row(name, known)
    schema = pass_class.Options.model_json_schema()
    needs = f"   needs data: {', '.join(row['needs'])}" if row["needs"] else ""
    head = f"{name}   preserves: {row['preserves']}   version {row['version']}{needs}"
    text = f"{head}\n\n{_documentation(pass_class)}\n\nOptions:\n{_options(schema)}"
    return Outcome(text, {**row, "doc": _documentation(pass_class), "options": schema})


def _options(schema: dict[str, Any]) -> str:
    """Return one entry per option, those of nested blocks below their block."""
    lines: list[str] = []
    _add_entries(lines, schema, schema, "", set())
    return "\n".join(lines)


def _add_entries(
    lines: list[str], schema: dict[str, Any], root: dict[str, Any], prefix: str, seen: set[str]
) -> None:
    required = schema.get("required", ())
    for key, value in schema.get("properties", {}).items():
        inner = [n for n in _references(value) if "properties" in root["$defs"][n]]
        default = "" if inner else _shown(value.get("default"))
        note = ", required" if key in required else f", default {default}" if default else ""
        lines.append(f"  {prefix}{key}: {_type(value, root)}{note}")
        if value.get("description"):
            lines.append(f"      {value['description']}")
        for name in inner:
            if name not in seen:
                _add_entries(lines, root["$defs"][name], root, f"{prefix}{key}.", {*seen, name})


def _references(value: Any) -> list[str]:
    """Return the definitions that a type names directly or in a union."""
    if isinstance(value, dict):
        own = [value["$ref"].rpartition("/")[2]] if "$ref" in value else []
        inner = (value.get(key, ()) for key in ("anyOf", "oneOf", "allOf"))
        return own + [name for items in inner for item in items for name in _references(item)]
    return []


def _type(value: Mapping[str, Any], root: Mapping[str, Any]) -> str:
    """Return a type in words: `integer`, `list of text`, `per_tensor | per_channel`."""
    if "$ref" in value:
        target: dict[str, Any] = root["$defs"][value["$ref"].rpartition("/")[2]]
        return "block" if "properties" in target else _type(target, root)
    if "enum" in value:
        return " | ".join(map(str, value["enum"]))
    if "const" in value:
        return str(value["const"])
    for key in ("anyOf", "oneOf", "allOf"):
        if key in value:
            kinds = dict.fromkeys(_type(item, root) for item in value[key])
            return " | ".join(kind for kind in kinds if kind != "null")
    if value.get("type") == "array":
        return f"list of {_type(value.get('items', {}), root)}"
    if value.get("examples"):
        return f"text like {value['examples'][0]}"
    kind = str(value.get("type", "any"))
    return {"string": "text", "object": "mapping"}.get(kind, kind)


def _shown(default: Any) -> str:
    if default is None:
        return ""
    return str(default).lower() if isinstance(default, bool) else str(default) or '""'
