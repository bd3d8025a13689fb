"""Optional dependencies of output formats."""

import importlib.util

from fxcompress.errors import MissingExtraError

__all__ = ["need_onnx"]


def need_onnx() -> None:
    """Check that the packages of the `onnx` extra are there.

    Raises:
        MissingExtraError: One is not installed.
    """
    missing = [
        name
        for name in ("onnx", "onnxscript", "onnxruntime")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise MissingExtraError(
            "the ONNX format needs packages that are not installed",
            reason=f"there is no {', '.join(missing)}",
            hint="pip install 'fxcompress[onnx]'",
        )
