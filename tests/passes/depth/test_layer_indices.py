"""Skipping blocks and layer indices: a captured graph has none, and what followed one stays."""

import pytest
import torch
from torch import nn

from fxcompress.ir import capture
from fxcompress.ir.ops import bind, op_name
from passes.depth.skip_blocks import SkipBlocks
from tests.passes.support import apply, seeded

SIZES = {"x": {0: "batch", 1: "seq"}}


class Layer(nn.Module):
    """Uses its index as code does: a scale, a table, every second one without a window, a cache."""

    def __init__(self, index, width):
        super().__init__()
        self.index = index
        self.mix, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x, table, cache):
        h = self.mix(x) / (self.index + 1) ** 0.5 + table[self.index]
        if self.index % 2:
            h = h.cumsum(1)
        cache[self.index] = h
        return x + self.out(torch.tanh(cache[self.index]))


class Indexed(nn.Module):
    def __init__(self, width=8, depth=5):
        super().__init__()
        self.layers = nn.ModuleList(Layer(index, width) for index in range(depth))
        self.table = nn.Parameter(torch.randn(depth, width))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        cache = {}
        for layer in self.layers:
            x = layer(x, self.table, cache)
        return self.head(x)


@pytest.mark.parametrize("removed", [(0,), (1, 3), (2, 4)])
def test_what_follows_the_index_stays_that_of_the_block_that_stays(removed):
    program = capture(seeded(Indexed), (torch.randn(2, 5, 8),), dynamic=SIZES, verify=False)
    result = apply(SkipBlocks, program, {"layers": list(removed)})
    model = seeded(Indexed)
    x = torch.randn(3, 4, 8)
    cache, wanted = {}, x
    for layer in model.layers:
        if layer.index not in removed:
            wanted = layer(wanted, model.table, cache)
    assert torch.equal(result.program(x), model.head(wanted))


def test_a_graph_holds_tensors_and_no_cache_index():
    """A cache that code indexes by layer is plain Python, and gone when the graph is captured."""
    program = capture(seeded(Indexed), (torch.randn(2, 5, 8),), dynamic=SIZES, verify=False)
    result = apply(SkipBlocks, program, {"layers": [1]})
    reads = [n for n in result.program.nodes if op_name(n) in ("getitem", "select")]
    indices = [bind(n)["index"] for n in reads]
    # What is left reads rows of the table, which is whole: those of the blocks that stay.
    assert indices == [0, 2, 3, 4]
    assert result.program.state()["table"].shape == (5, 8)
