"""Random inputs for proofs stay within what a model takes."""

import torch
from torch import Tensor, nn

from fxcompress.ir import capture
from fxcompress.pipeline._probes import probes, run


class Counted(nn.Module):
    """Positions are counted from a mask, or from where tokens are no padding."""

    def __init__(self, from_mask: bool):
        super().__init__()
        self.words, self.places = nn.Embedding(50, 4), nn.Embedding(10, 4)
        self.from_mask = from_mask

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        counted = mask if self.from_mask else (ids != 0).long()
        places = torch.cumsum(counted, 1) * counted
        return self.words(ids) + self.places(places) + mask[..., None]


def inputs(from_mask: bool) -> tuple[Tensor, ...]:
    program = capture(
        Counted(from_mask).eval(),
        (torch.ones(2, 8).long(), torch.ones(2, 8).long()),
    )
    (first, _) = probes(program, 0)
    run(program, first)
    return first


def test_what_is_counted_up_is_a_mask_and_no_index():
    ids, mask = inputs(from_mask=True)
    assert ids.max() > 10
    assert set(mask.unique().tolist()) == {1}


def test_tokens_that_a_comparison_counts_are_still_tokens():
    ids, _ = inputs(from_mask=False)
    assert len(ids.unique()) > 4
