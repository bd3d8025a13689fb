"""What a format is given, and what it must fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fxcompress.emit._artifact import Written
from fxcompress.emit._probes import Leaves
from fxcompress.emit.options import EmitOptions
from fxcompress.ir.program import Program

__all__ = ["Format", "Job"]


@dataclass(frozen=True)
class Job:
    """One program to write.

    Attributes:
        program: What to write; never changed.
        stage: The folder to write into.
        options: Of this call of `emit`.
        example: Tensor inputs of one call, every dynamic size at least 2.
        quantized: Whether the program holds fake-quantize nodes.
    """

    program: Program
    stage: Path
    options: EmitOptions
    example: Leaves
    quantized: bool

    def file(self, ending: str) -> str:
        """Return the file name with this ending."""
        return f"{self.options.stem}.{ending}"


class Format(Protocol):
    """A module of one output format."""

    @staticmethod
    def write(job: Job) -> Written:
        """Write the program into the staging folder."""

    @staticmethod
    def tolerance(job: Job) -> Mapping[str, float]:
        """Return `relative` (max |Δ| over the output's range) and `cosine` that are demanded."""
