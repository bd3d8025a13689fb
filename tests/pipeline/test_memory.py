import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, resource, sys
import torch
from torch import nn
from fxcompress.ir import capture
from fxcompress.pipeline import Context, execute
from tests.pipeline import passes


class All(passes.Noise):
    def decide(self, program, options, context):
        return passes.Names(names=tuple(program.state()))

    def rewrite(self, rewriter, decision):
        for name in decision.names:
            rewriter.set_tensor(name, rewriter.get_tensor(name) * 1.001)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(8))).eval()
size = sum(each.numel() * each.element_size() for each in model.parameters())
program = capture(model, (torch.randn(2, 2048),))
before = peak()
steps = [passes.step(All, f"pass{number}") for number in range(int(sys.argv[1]))]
execute(program, steps, Context(), sys.argv[2])
print(json.dumps([size, peak() - before]))
"""


def grown(passes, folder):
    """Return what a run adds to the peak, in units of the model's bytes."""
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(passes), str(folder)],
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    size, more = json.loads(found.stdout)
    return more / size


def test_memory_does_not_grow_with_the_number_of_passes(tmp_path):
    """Every pass here replaces every weight: the original, the last and the next are alive."""
    assert grown(6, tmp_path / "many") < grown(3, tmp_path / "few") + 0.5
