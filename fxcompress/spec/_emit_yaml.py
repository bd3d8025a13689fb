"""Write plain values as YAML: it reads back as the same values and is the same bytes each time."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from fxcompress.spec._yaml import resolve_scalar

__all__ = ["plain_text", "to_yaml"]

_BARE = re.compile(r"[A-Za-z0-9_./*$+-][A-Za-z0-9_./*$+%(), @-]*")
_FLOW_UNSAFE = re.compile(r"[,()]|^-|- | -$|^[*@%]| $")
_UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


def to_yaml(value: Any) -> str:
    """Return a document in block style: two spaces, keys in the order given, one value a line."""
    return "".join(f"{line}\n" for line in _lines(value))


def plain_text(value: str | int | float | bool | None) -> str:
    """Return a scalar as YAML spells it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if value != value:
            return ".nan"
        return repr(value) if abs(value) != float("inf") else ".inf" if value > 0 else "-.inf"
    return _text(value)


def _text(value: str) -> str:
    """Return a string, quoted where YAML would read it as something else."""
    bare = _BARE.fullmatch(value) and not _FLOW_UNSAFE.search(value)
    if bare and value not in {"-", "---", "..."} and isinstance(_resolved(value), str):
        return value
    quoted = json.dumps(value, ensure_ascii=False)
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", quoted)


def _resolved(value: str) -> object:
    try:
        return resolve_scalar(value)
    except ValueError:
        return None


def _lines(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        if not value:
            return ["{}"]
        return [line for key, item in value.items() for line in _entry(f"{_text(str(key))}:", item)]
    if isinstance(value, list | tuple):
        if not value:
            return ["[]"]
        return [line for item in value for line in _item(item)]
    return [plain_text(value)]


def _entry(head: str, value: Any) -> list[str]:
    """Return the lines of one key; lists of plain values stay on its line."""
    if isinstance(value, list | tuple) and value and all(_is_plain(item) for item in value):
        return [f"{head} [{', '.join(plain_text(item) for item in value)}]"]
    lines = _lines(value)
    if _is_plain(value) or not value:
        return [f"{head} {lines[0]}"]
    return [head, *(f"  {line}" for line in lines)]


def _item(value: Any) -> list[str]:
    first, *rest = _lines(value)
    return [f"- {first}", *(f"  {line}" for line in rest)]


def _is_plain(value: Any) -> bool:
    return not isinstance(value, Mapping | list | tuple)
