"""A package of small passes to write specs with, and a folder with a spec that is valid."""

import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from fxcompress.pipeline.catalog import GROUP, Catalog, catalog
from fxcompress.spec import Spec, load_model

CHANNELS = '''
from typing import Annotated, Any, Literal
from pydantic import Field
from fxcompress.pipeline.base import Decision, Options, Pass, Selection
from fxcompress.spec.units import Count, Percent

class Budget(Options):
    macs: Count | None = None
    parameters: Count | None = None

class L1(Options):
    use: Literal["l1"]
    scale: float = 1.0

class Taylor(Options):
    use: Literal["taylor"]
    samples: int

class Settings(Selection):
    criterion: Literal["l1", "taylor", "random"] = "l1"
    budget: Budget = Budget()
    round_to: int = Field(default=1, ge=1)
    keep: Percent = 0.5
    score: Annotated[L1 | Taylor, Field(discriminator="use")] | None = None
    layers: Annotated[int, Field(ge=1)] | dict[str, int] = {}

class Channels(Pass[Settings, Decision]):
    """Fewer channels."""
    Options = Settings
    Decision = Decision
    preserves = "approximate"
    def decide(self, program: Any, options: Settings, context: Any) -> Decision:
        return Decision()
    def rewrite(self, rewriter: Any, decision: Decision) -> None:
        pass
'''
FOLD = '''
from typing import Any
from fxcompress.pipeline.base import Decision, Options, Pass

class Fold(Pass[Options, Decision]):
    """Fold."""
    Options = Options
    Decision = Decision
    preserves = "exact"
    needs = frozenset({NEEDS})
    def decide(self, program: Any, options: Options, context: Any) -> Decision:
        return Decision()
    def rewrite(self, rewriter: Any, decision: Decision) -> None:
        pass
'''
VALID = """\
fxcompress: 1
name: small
model: {factory: "model.py:build", args: {width: 4}}
inputs: [{name: x, shape: [batch, 3]}]
data: {factory: "data.py:splits"}
metric: {use: accuracy, split: eval}
vars: {share: 40%}
passes:
  - {use: tidy.fold}
  - use: prune.channels
    id: shrink
    targets: ["layer*.conv1"]
    criterion: taylor
    budget: {macs: "${vars.share}"}
    round_to: 8
  - {use: static}
constraints: {metric_drop: 1.0%, size: 25%, metric: {min: 0.5}}
emit: [pt2, {use: onnx, opset: 20}]
"""
MODEL = """
import torch

def build(width: int = 4) -> torch.nn.Module:
    linear = torch.nn.Linear
    return torch.nn.Sequential(linear(3, width), torch.nn.ReLU(), linear(width, 2))
"""
NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Linear(3, width), nn.Linear(width, 3)
        self.drop = nn.Dropout(0.5)
    def forward(self, x, scale=None, *, bias=None):
        x = self.b(self.drop(self.a(x).relu()))
        x = x if scale is None else x * scale
        return x if bias is None else x + bias

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
    def forward(self, x):
        return self.head(self.embed(x))

class Branching(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x

def net(width=4): return Net(width)
def branching(): return Branching()
def tied(): return Tied()
def fails(width=4):
    raise RuntimeError("no such disk")
def nothing(): return None
def pair(): return Net(4), 3
def on_meta():
    with torch.device("meta"):
        return Net(4)
def reads_values():
    model = Net(4)
    model.level = float(torch.ones(1))
    return model
NUMBER = 4
"""
INPUTS = [{"name": "x", "shape": ["batch", 3]}]
DATA = """
import torch

def splits():
    x, y = torch.ones(4, 3), torch.zeros(4, dtype=torch.long)
    return {"train": [((x,), y)], "calibration": [((x,), y)], "eval": [((x,), y), ((x,), y)]}
"""


@pytest.fixture(scope="session")
def passes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalog]:
    root = tmp_path_factory.mktemp("site")
    package = root / "fake_passes"
    (package / "prune").mkdir(parents=True)
    (package / "tidy").mkdir()
    (package / "__init__.py").touch()
    (package / "_private.py").write_text("raise RuntimeError('imported')")
    (package / "prune/channels.py").write_text(CHANNELS)
    (package / "tidy/fold.py").write_text(FOLD.replace("{NEEDS}", "()"))
    (package / "static.py").write_text(FOLD.replace("NEEDS", "'calibration'"))
    sys.path.insert(0, str(root))
    yield catalog([EntryPoint("fake", "fake_passes", GROUP)])
    sys.path.remove(str(root))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "data.py").write_text(DATA)
    (tmp_path / "spec.yaml").write_text(VALID)
    return tmp_path


@pytest.fixture
def load(folder: Path, passes: Catalog) -> Callable[..., Spec]:
    """Load a spec of this text, or the valid one, from the folder."""

    def loaded(text: str | None = None, *overrides: str, name: str = "spec.yaml") -> Spec:
        if text is not None:
            (folder / name).write_text(text)
        return Spec.load(folder / name, overrides, passes=passes)

    return loaded


@pytest.fixture
def spec(folder: Path, passes: Catalog) -> Callable[..., Spec]:
    """Parse a spec of a model in `model.py`, by default `net`, with these other blocks."""
    (folder / "model.py").write_text(NETS)

    def parsed(model: Any = "model.py:net", **blocks: Any) -> Spec:
        return Spec.parse(
            {"fxcompress": 1, "model": model, "inputs": INPUTS, **blocks},
            folder=folder,
            passes=passes,
        )

    return parsed


def built(spec: Spec) -> nn.Module:
    model = load_model(spec).model
    assert isinstance(model, nn.Module)
    return model
