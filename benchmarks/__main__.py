"""Run the quick benchmarks, each in a process of its own: python -m benchmarks."""

import subprocess
import sys

NAMES = (
    "startup",
    "capture_speed",
    "plan_7b",
    "run_memory",
    "resnet50_int8",
    "prune.speed",
    "train.joint",
)

if __name__ == "__main__":
    failed = [
        name
        for name in NAMES
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode
    ]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
