"""How much memory a run takes: `python -m tests.pipeline.memory_runs PASSES FOLDER [spill]`.

Prints the bytes of the model, and what the run adds to the memory in use at its peak. Linux only.
"""

import gc
import json
import sys
from pathlib import Path

import torch
from torch import nn

from fxcompress.ir import capture
from fxcompress.pipeline import Context, execute
from tests.pipeline import passes


class All(passes.Noise):
    """Replace every weight."""

    def decide(self, program, options, context):
        return passes.Names(names=tuple(program.state()))

    def rewrite(self, rewriter, decision):
        for name in decision.names:
            rewriter.set_tensor(name, rewriter.get_tensor(name) * 1.001)


def memory(key):
    """Return `VmHWM` (the peak) or `VmRSS` (now) in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{key}:")[2].split()[0]) * 1024


def program():
    model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(12))).eval()
    return capture(model, (torch.randn(2, 2048),), verify=False)


def main():
    count, folder, *options = sys.argv[1:]
    original = program()
    size = sum(tensor.nbytes for tensor in original.state().values())
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    steps = [passes.step(All, f"pass{number}") for number in range(int(count))]
    execute(original, steps, Context(), folder, spill="spill" in options)
    print(json.dumps([size, memory("VmHWM") - before]))


if __name__ == "__main__":
    main()
