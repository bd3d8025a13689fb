"""Which line of the user's model made a call."""

from __future__ import annotations

import contextlib
import sys
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Final

import torch

__all__ = [
    "Place",
    "current_place",
    "full_place",
    "inside_kernel_choice",
    "place_of_error",
    "short_place",
]

_TORCH: Final = f"{Path(torch.__file__).parent}/"
_TORCH_MODELS: Final = f"{_TORCH}nn/modules/"
_OURS: Final = str(Path(__file__).parents[2])
_STANDARD: Final = str(Path(contextlib.__file__).parent)

Place = tuple[str, int]


def current_place() -> Place | None:
    """Return file and line of the innermost frame that belongs to a model, or None.

    Frames of torch, of the standard library and of fxcompress are skipped; a model made only of
    torch's own modules (`nn.Transformer`) is named by its line in `torch/nn/modules`.
    """
    frame: FrameType | None = sys._getframe(1)
    inside_torch: Place | None = None
    left_recorder = False
    while frame is not None:
        kind = _kind(frame.f_code.co_filename)
        if kind == "ours":
            if left_recorder and frame.f_code.co_name == "record_model":
                break
        elif kind == "user":
            return frame.f_code.co_filename, frame.f_lineno
        elif kind == "torch-model" and inside_torch is None:
            if frame.f_code.co_name not in ("_call_impl", "_wrapped_call_impl"):
                inside_torch = frame.f_code.co_filename, frame.f_lineno
        left_recorder = True
        frame = frame.f_back
    return inside_torch


def inside_kernel_choice() -> bool:
    """Whether torch is choosing a convolution's kernel by sizes; every one computes the same."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _kind(frame.f_code.co_filename) in ("torch", "ours"):
        code = frame.f_code
        if code.co_name == "conv" and code.co_filename.endswith("/_subclasses/fake_impls.py"):
            return True
        frame = frame.f_back
    return False


@cache
def _kind(filename: str) -> str:
    if filename.startswith(_OURS) and "/_recorder/" in filename.replace("\\", "/"):
        return "ours"
    if filename.startswith(_TORCH_MODELS) and not filename.endswith("module.py"):
        return "torch-model"
    if filename.startswith((_TORCH, "<")):
        return "torch"
    if filename.startswith(_STANDARD) and "site-packages" not in filename:
        return "standard"
    return "user"


@cache
def _relative(filename: str) -> str:
    # Shorter than the absolute path, and the same on every machine for installed packages.
    best = ""
    for entry in sys.path:
        prefix = str(Path(entry or ".").absolute()).rstrip("/\\")
        if filename.startswith(prefix) and len(prefix) > len(best):
            best = prefix
    return filename[len(best) :].lstrip("/\\").replace("\\", "/") if best else filename


def short_place(place: Place | None) -> str | None:
    """Return `package/file.py:123`, relative to where Python found it."""
    return f"{_relative(place[0])}:{place[1]}" if place else None


def full_place(place: Place | None) -> str | None:
    """Return `/path/to/file.py:123`, which an editor can open."""
    return f"{place[0]}:{place[1]}" if place else None


def place_of_error(error: BaseException) -> Place | None:
    """Return the innermost line of the model in the traceback of an error, or None."""
    place: Place | None = None
    trace = error.__traceback__
    while trace is not None:
        filename = trace.tb_frame.f_code.co_filename
        if _kind(filename) == "user":
            place = filename, trace.tb_lineno
        trace = trace.tb_next
    return place
