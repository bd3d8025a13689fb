"""What the extra `train` holds is imported by what uses it, and by nothing else."""

import subprocess
import sys

EXTRA = (
    "accelerate",
    "datasets",
    "PIL",
    "tensorboard",
    "tokenizers",
    "torchmetrics",
    "torchvision",
)
CODE = f"""
import importlib, pkgutil, sys
import fxcompress, fxcompress.cli, fxcompress.spec, fxcompress.train
import fxcompress.train.fitting, fxcompress.train.images, fxcompress.train.text
import fxcompress.train.launch, fxcompress.spec.load_data
import passes.train.fit, passes.train._train
from fxcompress.train import *
print(*[name for name in {EXTRA!r} if name in sys.modules])
"""


def test_nothing_of_the_extra_is_imported_before_it_is_used():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
