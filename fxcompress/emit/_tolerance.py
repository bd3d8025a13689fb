"""How far a reloaded artefact may be from its program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Final

import torch
from torch.utils import _pytree as pytree

from fxcompress.analysis import OutputComparison, compare, shaken
from fxcompress.emit._fresh import Expected, Tolerance
from fxcompress.emit._job import Job
from fxcompress.emit._lower import activation_bits
from fxcompress.emit._plain import PlainProgram

__all__ = ["Tolerances"]

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
# So many times what one last place of every weight does, but never more than this.
_TIES: Final = 4
_MOST: Final = Tolerance(0.5, 0.85)


class Tolerances:
    """What is demanded of the artefacts of one job.

    Integers of another runtime fall on other sides of ties. What a few of those do to the outputs
    is measured on the program itself: a model that amplifies them may differ by more.

    Args:
        job: What is written.
        plain: The program, as it is called.
        calls: The calls on which artefacts are compared.
    """

    def __init__(self, job: Job, plain: PlainProgram, calls: Sequence[Expected]) -> None:
        self.job, self.plain, self.calls = job, plain, calls

    def of(self, name: str) -> Tolerance:
        """Return the tolerance of the artefact `name`."""
        usual = _usual(name, self.job, self.plain)
        if not self.job.quantized or name not in _OTHER:
            return usual
        relative = min(_TIES * self._ties.relative, _MOST.relative)
        # An angle's cosine falls with its square.
        cosine = max(1 - _TIES**2 * (1 - self._ties.cosine), _MOST.cosine)
        return Tolerance(max(usual.relative, relative), min(usual.cosine, cosine))

    @cached_property
    def _ties(self) -> OutputComparison:
        moved = shaken(self.plain.module)
        found = []
        for call in self.calls:
            with torch.no_grad():
                flat = pytree.tree_leaves(moved(*call.args, **call.kwargs))
            tensors = [leaf for leaf in flat if isinstance(leaf, torch.Tensor)]
            found.append(compare(list(call.outputs.values()), tensors))
        return max(found, key=lambda each: each.relative)


def _usual(name: str, job: Job, plain: PlainProgram) -> Tolerance:
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
    return Tolerance(0.25, 0.97) if bits >= 4 else _MOST
