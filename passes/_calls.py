"""Make the pass files of a family callable: `quantize.static(calibration=64)` is a step.

A step is what a spec says, `{"use": "quantize.static", "calibration": 64}`, and is checked where it
is used. Works for any package that is walked for passes; a pass file needs nothing for it.
"""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

__all__ = ["callable_family"]


class _PassModule(ModuleType):
    """A pass file that can be called with the pass's options."""

    def __call__(self, **options: Any) -> dict[str, Any]:
        """Return the step that applies this pass with these options."""
        return {"use": self.__name__.partition(".")[2], **options}


class _Family(ModuleType):
    """A package whose public files are callable, and imported when first asked for."""

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system sets a submodule as an attribute when it has been imported.
        if isinstance(value, ModuleType) and not name.startswith("_"):
            value.__class__ = _PassModule
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        qualified = f"{self.__name__}.{name}"
        if name.startswith("_") or importlib.util.find_spec(qualified) is None:
            raise AttributeError(f"there is no pass {qualified.partition('.')[2]}")
        return importlib.import_module(qualified)


def callable_family(name: str) -> None:
    """Make the public files of the package `name` callable; its `__init__` calls this."""
    sys.modules[name].__class__ = _Family
