"""Import and call the factories that a spec names: the only place where a spec runs code."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from fxcompress.errors import FxCompressError
from fxcompress.pipeline._close import did_you_mean
from fxcompress.spec._closure import FactoryRef

__all__ = ["call_factory", "load_factory"]

ErrorClass = type[FxCompressError]

_SPACE, _DIGEST = "spec_factory", "__digest__"


def load_factory(text: str, folder: Path, error: ErrorClass, where: str) -> Callable[..., Any]:
    """Return the callable that `file.py:function` or `package.module:callable` names.

    A file can import what lies beside it, at import and when it is called.

    Raises:
        error: It cannot be imported, has no such name, or the name is not callable.
    """
    ref = FactoryRef.parse(text)
    path = ref.file(folder)
    try:
        if path is None:
            module = importlib.import_module(ref.source)
        else:
            module = _file_module(path.resolve())
    except Exception as cause:
        raise error(
            f"cannot import {ref.source}",
            reason=_reason(cause, path),
            hint="" if path else "is the package installed in this environment?",
            where=where,
        ) from cause
    found = getattr(module, ref.name, None)
    if found is None:
        public = (name for name in vars(module) if not name.startswith("_"))
        hint = did_you_mean(ref.name, public, kind="it has")
        raise error(f"{ref.source} has no `{ref.name}`", hint=hint, where=where)
    if not callable(found):
        raise error(
            f"{text} is a {type(found).__name__}", reason="a factory is called", where=where
        )
    return _beside(found, path.resolve().parent) if path is not None else found


def call_factory(
    function: Callable[..., Any], args: Mapping[str, Any], text: str, error: ErrorClass, where: str
) -> Any:
    """Call a factory with keyword arguments.

    Raises:
        error: The arguments do not fit it, or it raised.
    """
    _check_arguments(function, args, text, error, where)
    try:
        return function(**args)
    except FxCompressError:
        raise
    except Exception as cause:
        source = inspect.getsourcefile(inspect.unwrap(function)) if callable(function) else None
        raise error(
            f"{text} failed", reason=_reason(cause, Path(source) if source else None), where=where
        ) from cause


def _check_arguments(
    function: Callable[..., Any], args: Mapping[str, Any], text: str, error: ErrorClass, where: str
) -> None:
    """Refuse arguments that a factory does not take."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(**args)
    except TypeError as cause:
        known = [p.name for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD]
        unknown = [name for name in args if name not in known]
        hint = did_you_mean(unknown[0], known, kind="it takes") if unknown else ""
        raise error(
            f"the `args` of {text} do not fit it", reason=str(cause), hint=hint, where=where
        ) from cause


def _reason(cause: BaseException, path: Path | None) -> str:
    """Return an exception in one line, with the last place in the user's file that led to it."""
    text = f"{type(cause).__name__}: {cause}".strip().rstrip(":")
    if isinstance(cause, SyntaxError):
        return f"{text}, line {cause.lineno}"
    frames = traceback.extract_tb(cause.__traceback__)
    own = [f for f in frames if path is not None and Path(f.filename).parent == path.parent]
    if not own:
        return text
    return f"{text}, at {Path(own[-1].filename).name}:{own[-1].lineno}"


def _file_module(path: Path) -> ModuleType:
    """Import a Python file under a name of its own; an unchanged file is imported once.

    The name holds no trace of the folder, so that texts which show it are the same everywhere.
    """
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    name, count = f"{_SPACE}.{path.stem}", 1
    while (known := sys.modules.get(name)) is not None:
        if (known.__file__, known.__dict__.get(_DIGEST)) == (str(path), digest):
            return known
        count += 1
        name = f"{_SPACE}.{path.stem}_{count}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path.name} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    module.__dict__[_DIGEST] = digest
    # Dataclasses, pickling and type hints look their module up by name.
    sys.modules[name] = module
    try:
        with _importable(path.parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _beside(function: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """Wrap a factory so that it can import what lies beside it while it runs."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with _importable(folder):
            return function(*args, **kwargs)

    return functools.update_wrapper(call, function)


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Make the files of a folder importable by name, and forget those names afterwards.

    Two specs may each have a `model.py` that their `data.py` imports.
    """
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).is_relative_to(folder) and not name.startswith(_SPACE):
                if "site-packages" not in Path(file).parts:
                    del sys.modules[name]
