"""The `inductor` format: machine code for this CPU, compiled ahead of time by AOTInductor.

The package needs torch of the same version and a CPU with the same instructions, and no compiler.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections import Counter

import torch

from fxcompress.emit._artifact import Written
from fxcompress.emit._compiled import counted, lowered_export
from fxcompress.emit._job import Job
from fxcompress.emit._lower import Lowered
from fxcompress.emit._plain import plain_program
from fxcompress.errors import EmitError

__all__ = ["write"]

_COMPILERS = ("g++", "clang++", "c++")


def write(job: Job) -> Written:
    """Lower, export, compile and package the program.

    Raises:
        EmitError: There is no C++ compiler, torch.export refuses the graph, or it does not compile.
    """
    if not any(shutil.which(name) for name in _COMPILERS):
        raise EmitError(
            "the inductor artefact needs a C++ compiler",
            reason=f"none of {', '.join(_COMPILERS)} is on the path",
            hint="install one, or emit `pt2` with `quantized: decomposed` and compile it elsewhere",
        )
    exported, lowered = lowered_export(job.program, job.example)
    name = f"{job.options.stem}.inductor.pt2"
    kernels: Counter[str] = Counter()
    log = logging.getLogger("torch._inductor")
    level = log.level
    try:
        log.setLevel(logging.ERROR)
        # With gradients on, inductor freezes nothing and makes no int8 kernel.
        with torch.no_grad(), warnings.catch_warnings(), counted(kernels):
            warnings.simplefilter("ignore")
            torch._inductor.aoti_compile_and_package(
                exported.program,
                package_path=str(job.stage / name),
                inductor_configs={"freezing": True},
            )
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise EmitError(
            "inductor cannot compile the program",
            reason=f"{type(error).__name__}: {' '.join(lines[:3])}",
            hint="emit it as `onnx` or `openvino`",
        ) from error
    finally:
        log.setLevel(level)
    usage = plain_program(job.program).usage()
    notes = [
        f"`module = torch._inductor.aoti_load_package({name!r})`, then `{usage}`",
        f"compiled for this CPU ({torch.backends.cpu.get_cpu_capability()}), torch "
        f"{torch.__version__}",
        *_kernel_notes(kernels, lowered),
    ]
    return Written((name,), (*notes, *lowered.notes, *exported.notes))


def _kernel_notes(kernels: Counter[str], lowered: Lowered) -> list[str]:
    found = []
    for kind, key, total in (
        ("convolutions", "convolutions", lowered.convolutions),
        ("linear layers", "linears", lowered.linears),
    ):
        if total:
            found.append(f"{kernels[key]} of {total} {kind} are int8 kernels of oneDNN")
    if kernels["weight_only"]:
        found.append(f"{kernels['weight_only']} linear layers read integer weights")
    return found
