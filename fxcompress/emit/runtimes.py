"""Runtimes: which artefact each opens, what it needs, and how it is run in this process."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from fxcompress.emit._extras import has_extra, need_extra
from fxcompress.emit._plain import plain_program
from fxcompress.emit._runtimes import LOADERS
from fxcompress.ir.program import Program

__all__ = ["RUNTIMES", "Runtime"]


@dataclass(frozen=True)
class Runtime:
    """One runtime.

    Attributes:
        name: As `fxcompress bench --runtime` calls it.
        format: The output format that it opens.
        ending: Of the file to open.
        extra: The extra that brings it; None where torch alone does.
        tools: Programs of which one must be on the path, to write its artefacts.
    """

    name: str
    format: str
    ending: str
    extra: str | None = None
    tools: tuple[str, ...] = ()

    def available(self) -> bool:
        """Whether artefacts can be written and run here."""
        if self.extra is not None and not has_extra(self.extra):
            return False
        return not self.tools or any(shutil.which(name) for name in self.tools)

    def need(self) -> None:
        """Check that the packages are there.

        Raises:
            MissingExtraError: One is not installed.
        """
        if self.extra is not None:
            need_extra(self.extra)

    def artefact(self, folder: Path) -> Path | None:
        """Return the first artefact of this runtime in a folder."""
        return next(iter(sorted(folder.glob(f"*{self.ending}"))), None)

    def write(self, program: Program, folder: Path) -> Path:
        """Write what this runtime opens, to be timed: it is not proved equal to the Program.

        Args:
            program: What to write.
            folder: Where to; made if it is not there.

        Returns:
            The file to open.

        Raises:
            MissingExtraError: A package is not installed.
            EmitError: The Program cannot be written for this runtime.
        """
        from fxcompress.emit.driver import write_unproved

        self.need()
        write_unproved(program, folder, self.format)
        path = self.artefact(folder)
        assert path is not None, "the format writes a file of this ending"
        return path

    def caller(
        self,
        path: Path,
        program: Program,
        leaves: Sequence[torch.Tensor],
        threads: int | None = None,
    ) -> Callable[[], object]:
        """Open an artefact and return what runs it on one set of inputs.

        Args:
            path: The file to open.
            program: What the artefact was made of, or another with the same signature.
            leaves: Its tensor inputs, in placeholder order.
            threads: Threads the runtime may use; its own choice otherwise.
        """
        self.need()
        call = plain_program(program).call(leaves)
        names = (tensor.name for tensor in program.signature.inputs)
        bound: Mapping[str, Any] = {
            "args": call.args,
            "kwargs": call.kwargs,
            "leaves": dict(zip(names, leaves, strict=True)),
        }
        return LOADERS[self.format]([str(path)], (), threads)(bound)


RUNTIMES: Final[Mapping[str, Runtime]] = {
    each.name: each
    for each in (
        Runtime("onnxruntime", "onnx", ".onnx", extra="onnx"),
        Runtime("openvino", "openvino", ".xml", extra="openvino"),
        Runtime("executorch", "executorch", ".pte", extra="executorch"),
        Runtime("inductor", "inductor", ".inductor.pt2", tools=("g++", "clang++", "c++")),
    )
}
