"""What the benchmarks of trained mixtures share: their command line, and means over seeds."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

__all__ = ["parsed", "spread"]


def parsed(name: str, about: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return `text`, `cache`, `seed` and `render`; ends the program where the text is missing."""
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=about)
    parser.add_argument("text", nargs="?", type=Path, help="verses, one a line")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="keeps the trained models")
    parser.add_argument("--seed", type=int, action="append", help="only these seeds")
    parser.add_argument("--render", action="store_true", help="only write the table again")
    options = parser.parse_args(arguments)
    if options.text is None and not options.render:
        parser.error("name the file of the text")
    return options


def spread(values: Sequence[float], sign: str = "", digits: int = 3) -> str:
    """Return the mean ± the standard deviation, which one value has none of."""
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{deviation}"
