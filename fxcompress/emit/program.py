"""The `program` format: a `.fxp` file, graph and safetensors, for fxcompress itself."""

from fxcompress.emit._artifact import Written
from fxcompress.emit._job import Job
from fxcompress.rewrite import without_taps

__all__ = ["write"]


def write(job: Job) -> Written:
    """Save the program without taps; `Program.load` gives it back, ready for more passes."""
    name = job.file("fxp")
    without_taps(job.program).save(job.stage / name)
    notes = ["load it with fxcompress: `Program.load(path)`"]
    if job.quantized:
        notes.append("weights that their quantizers give back exactly are packed integers")
    return Written((name,), tuple(notes))
