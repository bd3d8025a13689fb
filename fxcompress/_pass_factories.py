"""Passes as functions of their options, by where their files are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["PassFactories"]


class PassFactories:
    """A family of passes: attributes are families below it, or functions that make a step.

    A function takes the pass's options and `id`, checks them, and returns the step as a mapping
    like those of a spec: `{"use": "quantize.static", "calibration": 64}`.
    """

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix

    def __getattr__(self, name: str) -> PassFactories | Callable[..., dict[str, Any]]:
        from fxcompress.pipeline.catalog import catalog

        full = f"{self._prefix}{name}"
        known = catalog()
        if full in known:
            return _factory(full)
        if any(each.startswith(f"{full}.") for each in known):
            return PassFactories(f"{full}.")
        raise AttributeError(f"there is no pass `{full}`: {known.suggest(full)}")

    def __dir__(self) -> list[str]:
        from fxcompress.pipeline.catalog import catalog

        below = (
            each.removeprefix(self._prefix) for each in catalog() if each.startswith(self._prefix)
        )
        return sorted({each.partition(".")[0] for each in below})

    def __repr__(self) -> str:
        return f"passes.{self._prefix}".rstrip(".")


def _factory(use: str) -> Callable[..., dict[str, Any]]:
    from fxcompress.pipeline.catalog import catalog

    pass_class = catalog().find(use)

    def make(*, id: str | None = None, **options: Any) -> dict[str, Any]:
        from fxcompress.spec import parse_options

        parse_options(pass_class, options)
        return {"use": use, **({} if id is None else {"id": id}), **options}

    make.__name__ = use.rpartition(".")[2]
    make.__qualname__ = f"passes.{use}"
    make.__doc__ = pass_class.__doc__
    return make
