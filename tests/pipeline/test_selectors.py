"""Selectors: what they match, and what they say when they match nothing."""

import pytest
import torch
from torch import nn

from fxcompress.errors import SelectorError
from fxcompress.pipeline.base import Selection
from fxcompress.pipeline.selectors import Candidate, Selector

NODES = [
    Candidate("stem", "conv2d", "torch.nn.Conv2d"),
    Candidate("layer1.0.conv1", "conv2d", "torch.nn.Conv2d"),
    Candidate("layer1.0.bn1", "batch_norm", "torch.nn.BatchNorm2d"),
    Candidate("layer1.0/relu", "relu"),
    Candidate("layer1.0/relu@2", "relu"),
    Candidate("layer1.1.conv1", "conv2d", "torch.nn.Conv2d"),
    Candidate("layer1.1.norm", "layer_norm", "mine.blocks.Norm"),
    Candidate("fc", "linear", "torch.nn.Linear"),
]


@pytest.mark.parametrize(
    ("selector", "chosen"),
    [
        (Selector(), [node.id for node in NODES]),
        (Selector(targets=("layer*.*.conv1",)), ["layer1.0.conv1", "layer1.1.conv1"]),
        (Selector(targets=("*conv1", "fc")), ["layer1.0.conv1", "layer1.1.conv1", "fc"]),
        (Selector(targets=("layer1.0/*",)), ["layer1.0/relu", "layer1.0/relu@2"]),
        (Selector(targets=("layer1.?.conv[12]",)), ["layer1.0.conv1", "layer1.1.conv1"]),
        (Selector(types=("conv2d",)), ["stem", "layer1.0.conv1", "layer1.1.conv1"]),
        (Selector(types=("Conv2d", "Linear")), ["stem", "layer1.0.conv1", "layer1.1.conv1", "fc"]),
        (Selector(types=("torch.nn.Linear",)), ["fc"]),
        (Selector(types=("Norm",)), ["layer1.1.norm"]),
        (Selector(types=("*Norm*",)), ["layer1.0.bn1", "layer1.1.norm"]),
        (Selector(types=("conv2d",), exclude=("stem",)), ["layer1.0.conv1", "layer1.1.conv1"]),
        (Selector(targets=("layer1.*",), types=("relu",), expect=2),
         ["layer1.0/relu", "layer1.0/relu@2"]),
        (Selector(targets=("fc",), exclude=("fc",), expect=0), []),
    ],
)  # fmt: skip
def test_choose(selector: Selector, chosen: list[str]) -> None:
    assert selector.choose(NODES) == chosen


@pytest.mark.parametrize(
    ("selector", "what", "reason", "hint"),
    [
        (Selector(targets=("layer1.0.conv9",)), "`layer1.0.conv9` in `targets`", "none of 8",
         "`layer1.0.conv1`"),
        (Selector(targets=("layer1",)), "matches nothing", "", "6 candidates: write `layer1.*`"),
        (Selector(targets=("conv1",)), "matches nothing", "", "2 ids end in it: write `*conv1`"),
        (Selector(targets=("fc", "typo")), "`typo` in `targets`", "", "there are: `stem`"),
        (Selector(exclude=("fcc",)), "`fcc` in `exclude`", "none of 8", "`fc`"),
        (Selector(types=("con2d",)), "`con2d` in `types`", "op or class", "`conv2d`"),
        (Selector(targets=("fc",), types=("relu",)), "nothing is selected",
         "1 match the targets, 0 of these", "`linear`"),
        (Selector(targets=("fc",), exclude=("fc",)), "nothing is selected", "1 are excluded", ""),
        (Selector(types=("relu",), expect=3), "2 nodes are selected, 3 are expected",
         "`layer1.0/relu`", "correct `expect`"),
        (Selector(targets=("fc",), expect=0), "1 nodes are selected, 0 are expected", "`fc`", ""),
    ],
)  # fmt: skip
def test_choose_refuses(selector: Selector, what: str, reason: str, hint: str) -> None:
    with pytest.raises(SelectorError) as caught:
        selector.choose(NODES)
    assert what in caught.value.what
    assert reason in caught.value.reason
    assert hint in caught.value.hint
    assert caught.value.exit_code == 2


def test_no_candidates_is_an_error_unless_expected() -> None:
    with pytest.raises(SelectorError, match="no node that this pass works on"):
        Selector(types=("conv2d",)).choose([])
    assert Selector(expect=0).choose([]) == []


def test_from_options() -> None:
    options = Selection(targets=("a",), types=("b",), exclude=("c",), expect=2)
    assert Selector.of(options) == Selector(("a",), ("b",), ("c",), 2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def test_select_on_a_program() -> None:
    from fxcompress.ir import capture, node_ids

    program = capture(Net().eval(), (torch.ones(2, 4),))
    ids = node_ids(program)
    chosen = Selector(types=("Linear",)).select(program)
    assert [ids[node] for node in chosen] == ["first", "second"]
    assert [ids[node] for node in Selector(types=("relu",)).select(program)] == ["/relu"]
    assert [ids[node] for node in Selector().select(program, chosen[:1])] == ["first"]
    assert [ids[n] for n in Selector(targets=("*",)).select(program)] == [
        "first",
        "/relu",
        "second",
    ]


PARTS = [
    Candidate(f"mlp.experts.{e}.{name}", "experts", "", (f"mlp.experts.{e}", "mlp.experts"))
    for e in (0, 1)
    for name in ("up", "down")
]


@pytest.mark.parametrize(
    ("selector", "chosen"),
    [
        (Selector(targets=("mlp.experts",)), [0, 1, 2, 3]),
        (Selector(targets=("*.experts.1",)), [2, 3]),
        (Selector(targets=("*.experts.*.down",), expect=2), [1, 3]),
        (Selector(targets=("*.experts",), exclude=("*.experts.0", "*.1.up")), [3]),
    ],
)
def test_a_part_is_selected_with_what_it_belongs_to(selector, chosen):
    assert selector.choose([*NODES, *PARTS]) == [PARTS[i].id for i in chosen]


@pytest.mark.parametrize("pattern", ["mlp.experts.2", "*.experts.7"])
def test_a_number_that_is_not_there_is_told_those_that_are(pattern):
    with pytest.raises(SelectorError, match="matches nothing") as caught:
        Selector(targets=(pattern,)).choose([*NODES, *PARTS])
    assert "holds 0 to 1" in str(caught.value.hint)
