"""Small models that hold what the passes look for."""

import torch
from torch import nn


class BasicBlock(nn.Module):
    def __init__(self, channels, out=None, stride=1):
        super().__init__()
        out = out or channels
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU()
        self.down = None
        if stride != 1 or out != channels:
            self.down = nn.Sequential(nn.Conv2d(channels, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.down is None else self.down(x)))


class ResNet(nn.Module):
    """Stem, two stages of two blocks, pooling, classifier."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(BasicBlock(width), BasicBlock(width))
        self.layer2 = nn.Sequential(BasicBlock(width, 2 * width, 2), BasicBlock(2 * width))
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x):
        x = self.layer2(self.layer1(self.pool(self.stem(x))))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Layer(nn.Module):
    """A transformer layer, norm first or last."""

    def __init__(self, width, heads, *, first=True):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.act, self.down = (
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )
        self.heads, self.first = heads, first

    def attend(self, x, mask):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def forward(self, x, mask=None):
        if self.first:
            x = x + self.attend(self.norm1(x), mask)
            return x + self.down(self.act(self.up(self.norm2(x))))
        x = self.norm1(x + self.attend(x, mask))
        return self.norm2(x + self.down(self.act(self.up(x))))


class Transformer(nn.Module):
    """Embeddings, layers, and a pooled output; `attention_mask` is 1 for tokens that count."""

    def __init__(self, width=32, depth=4, heads=4, *, first=True):
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.layers = nn.ModuleList(Layer(width, heads, first=first) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 7)

    def forward(self, ids, attention_mask=None):
        x = self.embed(ids)
        mask = None if attention_mask is None else attention_mask[:, None, None, :] > 0
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(self.norm(x).mean(1))


class Reader(nn.Module):
    """A convolution over time, an LSTM in both directions, and two layers on its output."""

    def __init__(self, width=6):
        super().__init__()
        self.conv = nn.Conv1d(4, width, 3, padding=1)
        self.lstm = nn.LSTM(width, width, batch_first=True, bidirectional=True)
        self.gate, self.value = nn.Linear(2 * width, 3), nn.Linear(2 * width, 3)

    def forward(self, x):
        y = self.conv(x.transpose(1, 2)).relu().transpose(1, 2)
        y = self.lstm(y)[0]
        return (self.value(y) * self.gate(y).sigmoid()).mean(1)


def token_batches(count=4, batch=4, seq=12, seed=0, masked=False):
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(0, 50, (batch, seq), generator=generator)
        if masked:
            lengths = torch.randint(1, seq + 1, (batch, 1), generator=generator)
            batches.append({"ids": ids, "attention_mask": (torch.arange(seq) < lengths).long()})
        else:
            batches.append((ids,))
    return batches


def image_batches(count=4, batch=4, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = shape or (3, 16, 16)
    return [(torch.randn(batch, *shape, generator=generator),) for _ in range(count)]
