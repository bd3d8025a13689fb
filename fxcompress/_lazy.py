"""Lazy package attributes (PEP 562), so that a command which needs no torch never pays for it."""

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any


def lazy_exports(
    package: str, table: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` for a package whose names load on first use.

    A public name wins over a submodule of the same name (`fxcompress.ir.diff` is the function,
    whether or not the module `diff` was imported before).

    Args:
        package: The package's `__name__`.
        table: Public name -> submodule that defines it, relative to the package.
    """
    names = sorted(table)

    def getattr_(name: str) -> Any:
        if name not in table:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{table[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    class LazyPackage(ModuleType):
        """A package that import cannot make forget its public names."""

        def __setattr__(self, name: str, value: Any) -> None:
            # The import system binds a submodule to its package right after running it.
            if isinstance(value, ModuleType) and table.get(name) == name:
                value = getattr(value, name)
            super().__setattr__(name, value)

    sys.modules[package].__class__ = LazyPackage
    return getattr_, lambda: names, names
