"""How long the commands take that need no torch: `--help`, `check`, `passes` and `schema`.

python -m benchmarks.startup [--repeats 11]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks._common import child, median, write_table

SPEC = Path(__file__).parents[1] / "specs" / "digits" / "spec.yaml"
COMMANDS = {
    "--help": ["--help"],
    "check specs/digits/spec.yaml": ["check", str(SPEC)],
    "passes": ["passes"],
    "schema": ["schema"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(options.repeats + 1):
        for name, arguments in COMMANDS.items():
            result = child(["-m", "fxcompress", *arguments])
            if turn:
                times[name].append(result.seconds)
    rows = []
    for name, arguments in COMMANDS.items():
        listing = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "fxcompress", *arguments],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
        torch = "yes" if any(line.endswith(" torch") for line in listing.splitlines()) else "no"
        rows.append(
            (f"`fxcompress {name}`", f"{median(times[name]):.2f}", f"{max(times[name]):.2f}", torch)
        )
    write_table(
        "startup",
        "Start-up of the commands that need no torch",
        "python -m benchmarks.startup",
        ("command", "wall s, median", "wall s, largest", "imports torch"),
        rows,
        "Goal: ≤ 0.5 s for `--help` and `check`; `passes` and `schema` read every pass's options.",
    )


if __name__ == "__main__":
    main()
