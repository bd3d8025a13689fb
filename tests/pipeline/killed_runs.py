"""Kill runs with SIGKILL at chosen points, resume each, and compare with a run that was left alone.

Run as a script: `python -m tests.pipeline.killed_runs FOLDER POINTS`. Prints a JSON list of
`[point, where it was killed, files that differ after resuming]`.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

import torch

from fxcompress.pipeline import Context, execute
from tests.pipeline import passes
from tests.pipeline.passes import step
from tests.rewrite import models

VARYING = ("run.json", "record.json", "manifest.json", ".running")
"""Files that hold seconds, or hashes of such, and the guard."""


def run(folder, *, resume=False):
    steps = [
        step(passes.Noise), step(passes.Calibrate), step(passes.Identity), step(passes.HeadNoise),
    ]  # fmt: skip
    batches = [(torch.full((3, 3, 6, 6), float(i)),) for i in range(2)]
    context = Context(data={"calibration": batches}, seed=1)
    return execute(models.convnet(), steps, context, folder, resume=resume)


def calls_of_pipeline(act, at=None):
    """Run `act`, counting calls of pipeline functions; die at the call numbered `at`."""
    seen = []

    def watch(frame, event, _):
        code = frame.f_code
        if event == "call" and ("pipeline" in code.co_filename or "_files" in code.co_filename):
            seen.append(code.co_name)
            if len(seen) - 1 == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(watch)
    try:
        act()
    finally:
        sys.setprofile(None)
    return seen


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in VARYING
    }


def kill_and_resume(folder, point):
    child = os.fork()
    if child == 0:
        calls_of_pipeline(lambda: run(folder), at=point)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the run ended before point {point}"
    fresh = not (folder / "run.json").exists()
    run(folder, resume=not fresh)
    return content(folder)


def main():
    base, count = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    names = calls_of_pipeline(lambda: run(base / "whole"))
    expected = content(base / "whole")
    writing = [
        i for i, name in enumerate(names) if name in ("write_tensors", "sync_folder", "save")
    ]
    choose = random.Random(0)
    points = choose.sample(range(len(names)), count) + choose.sample(writing, count)
    found = []
    for number, point in enumerate(points):
        actual = kill_and_resume(base / str(number), point)
        differing = [n for n in expected.keys() | actual.keys() if expected.get(n) != actual.get(n)]
        found.append([point, names[point], sorted(differing)])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
