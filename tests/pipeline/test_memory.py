import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def grown(passes, folder, *options):
    """Return what a run adds to the memory in use at its peak, in units of the model's bytes."""
    found = subprocess.run(
        [sys.executable, "-m", "tests.pipeline.memory_runs", str(passes), str(folder), *options],
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
    few, many = grown(2, tmp_path / "few"), grown(5, tmp_path / "many")
    assert 1.9 < few < 2.9
    assert many < few + 0.9


def test_the_original_can_live_in_the_run_folder(tmp_path):
    """Then only the last and the next are alive; the original's memory is theirs."""
    assert grown(4, tmp_path, "spill") < 2.2
