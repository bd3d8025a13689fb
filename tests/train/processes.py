"""Start processes that train together, on this machine, and collect what each says."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(arguments, count=2, port=None, **environment):
    """Start `python arguments` in each of `count` processes, as torchrun would."""
    port = port or free_port()
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
              "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
              **environment}  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)], text=True, cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]  # fmt: skip


def finish(processes, timeout=300):
    """Return `(exit code, stdout, stderr)` of each."""
    found = []
    for process in processes:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            for each in processes:
                each.kill()
            raise
        found.append((process.returncode, out, err))
    return found
