"""Settings for every test: under CI, property tests try the same examples each time."""

import os

import pytest
from hypothesis import settings

from tests.zygote import Zygote

settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(scope="session", autouse=True)
def quick_reloading():
    """Reload artefacts in a fork of a process that has imported torch."""
    zygote = Zygote()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxcompress.emit._fresh.subprocess", zygote.module)
        yield
    zygote.close()
