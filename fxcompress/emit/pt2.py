"""The `pt2` format: a torch.export archive that loads and runs with torch alone.

A quantized program is written as plain torch arithmetic unless asked otherwise: a file that uses
`torch.ops.quantized_decomposed` does not open until its reader has imported the private module of
torch that registers them, and then fails with an error that does not say so.
"""

from __future__ import annotations

import warnings

import torch

from fxcompress.emit._artifact import Written
from fxcompress.emit._exit_forms import with_exits
from fxcompress.emit._export import export_program
from fxcompress.emit._job import Job
from fxcompress.emit._lower import lower
from fxcompress.emit._plain import plain_program

__all__ = ["DECOMPOSED_IMPORT", "write"]

DECOMPOSED_IMPORT = "torch.ao.quantization.fx._decomposed"


def write(job: Job) -> Written:
    """Export the program and save the archive.

    Raises:
        EmitError: torch.export refuses the graph.
    """
    plain = plain_program(job.program)
    form = job.options.pt2.quantized
    lowered = lower(plain.module, form) if job.quantized else None
    exported, exits = with_exits(
        plain,
        job.example,
        ("rows", "branches", "together"),
        lambda own: export_program(own, job.program.dims, job.example),
    )
    # A file for other people must not carry a batch of the user's data.
    exported.program._example_inputs = None
    name = job.file("pt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(exported.program, job.stage / name)

    notes = [f"`module = torch.export.load({name!r}).module()`, then `{plain.usage()}`"]
    if lowered is not None and form == "decomposed":
        notes.append(f"import {DECOMPOSED_IMPORT} first: it registers the operators")
    elif lowered is not None:
        notes.append(
            "weights are stored as integers; rounding is written in plain torch operations"
        )
    if plain.flattened:
        notes.append(f"plain containers stand for {', '.join(plain.flattened)}")
    more = (*exported.notes, *exits, *(lowered.notes if lowered else ()))
    return Written((name,), (*notes, *more))
