import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress.ir import capture


class Padded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (1, 2)) * 2


def test_padding_leaves_the_batch_size_dynamic() -> None:
    program = capture(Padded(), (torch.randn(2, 8),))
    assert all(isinstance(node.meta["val"].shape[0], torch.SymInt) for node in _tensors(program))
    assert program(torch.randn(5, 8)).shape == (5, 11)


def _tensors(program: object) -> list[torch.fx.Node]:
    nodes = program.graph.nodes  # type: ignore[attr-defined]
    return [node for node in nodes if isinstance(node.meta.get("val"), Tensor)]
