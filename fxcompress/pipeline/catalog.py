"""Find the installed passes: entry points name packages, and a pass is named by where its file is.

Every entry point of the group `fxcompress.passes` names a package. Its files are walked in sorted
order without importing them: `passes/quantize/static.py` is the pass `quantize.static`. Files and
folders that start with an underscore are private. A file is imported when its pass is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from fxcompress.errors import PassError, UsageError
from fxcompress.pipeline._close import did_you_mean
from fxcompress.pipeline.base import Pass

__all__ = ["GROUP", "Catalog", "catalog"]

GROUP = "fxcompress.passes"

PassClass = type[Pass[Any, Any]]


class Catalog(Mapping[str, PassClass]):
    """Names of passes in sorted order, each with its class, imported on first use."""

    def __init__(self, modules: Mapping[str, str]) -> None:
        self._modules = dict(sorted(modules.items()))
        self._classes: dict[str, PassClass] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __contains__(self, name: object) -> bool:
        return name in self._modules

    def __getitem__(self, name: str) -> PassClass:
        """Return the class of a pass.

        Raises:
            KeyError: There is no such pass; `find` says what was meant.
            PassError: Its file cannot be imported or does not hold exactly one pass.
        """
        if name not in self._classes:
            self._classes[name] = _pass_in(self._modules[name], name)
        return self._classes[name]

    def find(self, name: str) -> PassClass:
        """Return the class of a pass, or say which was meant.

        Raises:
            UsageError: There is no such pass.
            PassError: As for `catalog()[name]`.
        """
        if name in self:
            return self[name]
        raise UsageError(f"there is no pass `{name}`", hint=self.suggest(name))

    def suggest(self, name: str) -> str:
        """Return what an unknown name may have been meant to be."""
        return did_you_mean(name, self, kind="installed") or "no passes are installed"

    def module(self, name: str) -> str:
        """Return the qualified name of the module that holds a pass."""
        return self._modules[name]


def catalog(entries: Iterable[EntryPoint] | None = None) -> Catalog:
    """Return the passes of all installed packages, or of the given entry points.

    Raises:
        UsageError: An entry point names no package, or two packages hold a pass of one name.
    """
    found: dict[str, str] = {}
    points = entry_points(group=GROUP) if entries is None else entries
    for package in sorted({point.value for point in points}):
        for name, module in _walk(package):
            if name in found:
                raise UsageError(
                    f"two packages hold a pass `{name}`",
                    reason=f"{found[name]} and {module}",
                    hint="uninstall one of them, or move its file",
                )
            found[name] = module
    return Catalog(found)


def _walk(package: str) -> list[tuple[str, str]]:
    """Return `(pass name, module)` of every public file below a package, importing none."""
    folders = _folders(package)
    if not folders:
        raise UsageError(
            f"the entry point {package} of {GROUP} names no package",
            hint="reinstall the distribution that declares it",
        )
    names = {name for folder in folders for name in _files(folder, ())}
    return [(name, f"{package}.{name}") for name in sorted(names)]


def _files(folder: Path, above: tuple[str, ...]) -> Iterator[str]:
    """Yield the dotted names of the public Python files in a folder and below it."""
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("_") or not entry.stem.isidentifier():
            continue
        if entry.is_dir():
            yield from _files(entry, (*above, entry.name))
        elif entry.suffix == ".py":
            yield ".".join((*above, entry.stem))


def _folders(package: str) -> list[Path]:
    """Return the folders of a package without importing it or what stands above it."""
    top, *below = package.split(".")
    # Editable installs may map packages through finders of their own, so ask all of them.
    spec = importlib.util.find_spec(top)
    if spec is None or spec.submodule_search_locations is None:
        return []
    places = [Path(place, *below) for place in spec.submodule_search_locations]
    return [place for place in places if place.is_dir()]


def _pass_in(module_name: str, name: str) -> PassClass:
    """Import a file and return the one pass that it defines."""
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise PassError(
            f"pass `{name}` cannot be imported",
            reason=f"{type(error).__name__}: {error}",
            where=module_name,
        ) from error
    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Pass)
        and value.__module__ == module.__name__
        and not value.__name__.startswith("_")
        and not getattr(value, "__abstractmethods__", None)
    ]
    if len(own) != 1:
        names = ", ".join(cls.__name__ for cls in own) or "none"
        raise PassError(
            f"the file of pass `{name}` should define exactly one Pass",
            reason=f"it defines {names}",
            hint="a file that is no pass starts with an underscore",
            where=module_name,
        )
    reserved = {"use", "id", "skip"} & set(own[0].Options.model_fields)
    if reserved:
        raise PassError(
            f"pass `{name}` has an option called `{min(reserved)}`",
            reason="`use`, `id` and `skip` belong to the step itself",
            where=module_name,
        )
    return own[0]
