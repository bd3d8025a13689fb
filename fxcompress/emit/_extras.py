"""Optional dependencies of output formats."""

import importlib.util
from collections.abc import Mapping
from typing import Final

from fxcompress.errors import MissingExtraError

__all__ = ["EXTRAS", "has_extra", "need_extra"]

_ONNX: Final = ("onnx", "onnxscript", "onnxruntime")

EXTRAS: Final[Mapping[str, tuple[str, ...]]] = {
    "onnx": _ONNX,
    # Its file is made from the ONNX export.
    "openvino": (*_ONNX, "openvino"),
    "executorch": ("executorch",),
}


def has_extra(name: str) -> bool:
    """Whether the packages of an extra are installed."""
    return not _missing(name)


def need_extra(name: str) -> None:
    """Check that the packages of an extra are there.

    Raises:
        MissingExtraError: One is not installed.
    """
    missing = _missing(name)
    if missing:
        raise MissingExtraError(
            f"the {name} format needs packages that are not installed",
            reason=f"there is no {', '.join(missing)}",
            hint=f"pip install 'fxcompress[{name}]'",
        )


def _missing(name: str) -> list[str]:
    return [package for package in EXTRAS[name] if importlib.util.find_spec(package) is None]
