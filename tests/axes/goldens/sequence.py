"""A tagger: embeddings, an LSTM that reads both ways, a GRU after it, attention over the result."""

import torch
from torch import Tensor, nn


class Tagger(nn.Module):
    """A tag for each word."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, width, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(2 * width, width, batch_first=True)
        self.q, self.k, self.v = (nn.Linear(width, 16) for _ in range(3))
        self.head = nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.gru(self.lstm(self.words(ids))[0])[0]
        q, k, v = (
            each(x).unflatten(-1, (4, -1)).transpose(1, 2) for each in (self.q, self.k, self.v)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(mixed.transpose(1, 2).flatten(2))


def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Tagger(), (torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]),)


AXES = """
words.weight[1]: embedding, 6
  words.weight[1] lstm.weight_ih_l0[1] lstm.weight_ih_l0_reverse[1]
lstm.weight_ih_l0[0]: neuron, 8
  lstm.weight_ih_l0[0] lstm.weight_hh_l0[0] lstm.weight_hh_l0[1] lstm.bias_ih_l0[0]
  lstm.bias_hh_l0[0] lstm.weight_ih_l0_reverse[0] lstm.weight_hh_l0_reverse[0]
  lstm.weight_hh_l0_reverse[1] lstm.bias_ih_l0_reverse[0] lstm.bias_hh_l0_reverse[0]
  gru.weight_ih_l0[1]
gru.weight_ih_l0[0]: neuron, 8
  gru.weight_ih_l0[0] gru.weight_hh_l0[0] gru.weight_hh_l0[1] gru.bias_ih_l0[0]
  gru.bias_hh_l0[0] q.weight[1] k.weight[1] v.weight[1]
q.weight[0].0: head, 4
  q.weight[0] q.bias[0] k.weight[0] k.bias[0] v.weight[0] v.bias[0] head.weight[1]
q.weight[0].1: head_width, 4
  q.weight[0] q.bias[0] k.weight[0] k.bias[0]
v.weight[0].1: head_width, 4
  v.weight[0] v.bias[0] head.weight[1]
frozen: rows are looked up by data (words)
  words.weight[0]
frozen: it is a size of the model's output (output)
  head.weight[0]
"""
