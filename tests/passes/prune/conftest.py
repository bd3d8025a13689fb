"""Models that criteria are tested on; no test changes them."""

import pytest

from tests.passes.models import image_batches
from tests.passes.prune.nets import Joined, Plain, Task


@pytest.fixture(scope="session")
def plain():
    return Task(Plain, image_batches(3, 4, 3, 3, 3))


@pytest.fixture(scope="session")
def joined():
    return Task(Joined, image_batches(2, 4, 3, 6, 6))
