"""Spare tests the seconds that a new process takes to import torch: fork it from one that has.

Every emitted artefact is reloaded in a process of its own. Here that process is a fork of one
that imported torch and the runtimes, and nothing of the project: as fresh, and sooner there.
"""

import json
import os
import runpy
import selectors
import signal
import subprocess
import sys
from types import SimpleNamespace

IMPORTS = ("torch.export", "onnxruntime")


class Zygote:
    """Stands in for `subprocess` where artefacts are reloaded; starts when it is first needed."""

    def __init__(self):
        self.process = None
        self.module = SimpleNamespace(
            run=self.run,
            DEVNULL=subprocess.DEVNULL,
            TimeoutExpired=subprocess.TimeoutExpired,
        )

    def run(self, command, *, stdin, stdout, stderr, timeout):
        """Run `python … SCRIPT FOLDER` as `subprocess.run` would."""
        *_, script, folder = command
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-W", "ignore", __file__],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        job = {"script": script, "folder": folder, "log": stderr.name, "cwd": os.getcwd()}
        self.process.stdin.write(json.dumps({**job, "environment": dict(os.environ)}) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        with selectors.DefaultSelector() as ready:
            ready.register(self.process.stdout, selectors.EVENT_READ)
            late = not ready.select(timeout)
        if late:
            os.kill(pid, signal.SIGKILL)
        code = int(self.process.stdout.readline())
        if late:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, code)

    def close(self):
        """End it."""
        if self.process is not None:
            self.process.communicate()


def serve():
    """Fork for every line of the input; say the child's number, and later its exit code."""
    for name in IMPORTS:
        __import__(name)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(job)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def child(job):
    """Run the script as a process that was just started would; never return."""
    code = 1
    try:
        log = os.open(job["log"], os.O_WRONLY | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.clear()
        os.environ.update(job["environment"])
        os.chdir(job["cwd"])
        sys.argv = [job["script"], job["folder"]]
        runpy.run_path(job["script"], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
