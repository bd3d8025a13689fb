"""How far a reloaded artefact may be from its program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch

from fxcompress.emit._fresh import Tolerance
from fxcompress.emit._job import Job
from fxcompress.emit._lower import activation_bits
from fxcompress.emit._plain import PlainProgram

__all__ = ["tolerance"]

_OTHER: Final = ("onnx", "openvino", "executorch", "inductor")
# max |Δ| over the range of the output. `program`, `python` and `pt2` call the same kernels of
# torch; another runtime adds up in another order, and rounds its integers at other ties.
_FLOAT: Final[Mapping[str, Tolerance]] = {
    "program": Tolerance(1e-5),
    "python": Tolerance(1e-5),
    "pt2": Tolerance(1e-4),
    **dict.fromkeys(_OTHER, Tolerance(1e-3)),
}
_HALF: Final = Tolerance(5e-2, 0.999)
_QUANTIZED: Final[Mapping[str, Tolerance]] = {
    "program": Tolerance(1e-5),
    "python": Tolerance(1e-2, 0.999),
    "pt2": Tolerance(1e-2, 0.999),
    **dict.fromkeys(_OTHER, Tolerance(0.1, 0.99)),
}


def tolerance(name: str, job: Job, plain: PlainProgram) -> Tolerance:
    """Return what is demanded of the artefact `name` of a job."""
    if job.quantized:
        return _quantized(name, activation_bits(plain.module))
    halved = name == "openvino" and job.options.openvino.half
    half = any(
        tensor.dtype in (torch.float16, torch.bfloat16)
        for tensor in plain.module.state_dict().values()
    )
    return _HALF if halved or (half and name in ("pt2", *_OTHER)) else _FLOAT[name]


def _quantized(name: str, bits: int) -> Tolerance:
    """Return how far integers may be off: the fewer bits, the more one that a tie sends elsewhere.

    A runtime adds up in another order, so that some values fall on the other side of a tie.
    """
    if name not in _OTHER or bits >= 8:
        return _QUANTIZED[name]
    return Tolerance(0.25, 0.97) if bits >= 4 else Tolerance(0.5, 0.85)
