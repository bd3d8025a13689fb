"""A language model with learned positions, one table for input and output, and a picked token."""

import torch
from torch import Tensor, nn


class Tied(nn.Module):
    """Embeddings, one feed-forward layer, and scores for the token after the last that counts."""

    def __init__(self, words: int = 11, width: int = 8) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(16, width)
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor, last: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        x = x + self.down(nn.functional.gelu(self.up(x)))
        picked = x.gather(1, last[:, None, None].expand(-1, 1, x.shape[2]))
        return self.head(picked.squeeze(1))


def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Tied(), (torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), torch.tensor([3, 1]))


AXES = """
words.weight[1]: residual, 8
  words.weight[1] places.weight[1] up.weight[1] down.weight[0] down.bias[0]
up.weight[0]: neuron, 12
  up.weight[0] up.bias[0] down.weight[1]
frozen: rows are looked up by data (words)
  words.weight[0]
frozen: rows are looked up by data (places)
  places.weight[0]
"""
