"""A small language model of characters and its text: reading, training, scoring.

The text is the King James Bible, in the public domain, as lines `Ge1:1 In the beginning …`.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Characters", "Text", "bits_per_character", "calibration", "read_text", "trained"]

WINDOW = 128
_WIDTH, _HEADS, _LAYERS = 256, 4, 3
_STEPS, _BATCH, _WARM_UP = 1500, 8, 100
_RATE, _DECAY, _LONGEST_STEP = 1.5e-3, 0.1, 1.0
# One of 20 pieces is held out.
_PIECE, _OF = 8192, 20


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, _HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = _turned(q, turns), _turned(k, turns)
        made = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(made.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate pairs of features (Su et al., 2021, arXiv:2104.09864) by `[2, window, width / 2]`."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = turns.to(x.dtype).unbind(0)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Characters(nn.Module):
    """A causal transformer with rotary positions, 2.4 M parameters at a width of 256.

    Args:
        count: Different characters.
        width: Of the hidden states.
    """

    def __init__(self, count: int, width: int = _WIDTH) -> None:
        super().__init__()
        self.characters = nn.Embedding(count, width)
        nn.init.normal_(self.characters.weight, std=0.02)
        half = width // _HEADS // 2
        angles = torch.arange(WINDOW)[:, None] * 10_000 ** (-torch.arange(half) / half)
        self.register_buffer("turns", torch.stack([angles.cos(), angles.sin()]), persistent=False)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(_LAYERS))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, count)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return logits `[batch, window, characters]` of what follows each of `[batch, window]`."""
        hidden = self.characters(input_ids)
        for block in self.blocks:
            hidden = block(hidden, self.turns)
        made: Tensor = self.lm_head(self.norm(hidden))
        return made


@dataclass(frozen=True)
class Text:
    """A text as numbers of characters, one piece of 20 held out.

    Attributes:
        characters: The different ones, in order.
        training: Pieces to train and to calibrate on.
        held_out: Pieces to judge on.
        digest: SHA-256 of the text.
    """

    characters: str
    training: tuple[Tensor, ...]
    held_out: tuple[Tensor, ...]
    digest: str

    def windows(self, held_out: bool, count: int) -> Tensor:
        """Return `[count, window + 1]` runs of characters that do not overlap, evenly spread."""
        pieces = self.held_out if held_out else self.training
        size = WINDOW + 1
        found = [piece[i : i + size] for piece in pieces for i in range(0, _PIECE - size, size)]
        return torch.stack(found[:: len(found) // count][:count])


def read_text(path: Path) -> Text:
    """Read the verses of a file, without their references."""
    lines = path.read_text(encoding="utf-8").splitlines()
    text = "\n".join(line.partition(" ")[2] for line in lines)
    characters = "".join(sorted(set(text)))
    place = {each: index for index, each in enumerate(characters)}
    ids = torch.tensor([place[each] for each in text])
    pieces = ids[: len(ids) // _PIECE * _PIECE].split(_PIECE)
    training = tuple(piece for index, piece in enumerate(pieces) if index % _OF)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Text(characters, training, pieces[::_OF], digest)


def trained(
    text: Text, cache: Path, *, width: int = _WIDTH, steps: int = _STEPS
) -> tuple[Characters, float]:
    """Return the model and the CPU seconds that training took; what `cache` holds is read.

    The seed is fixed. Products are in bfloat16, so that other processors train another model.
    """
    file = cache / f"characters-{text.digest[:12]}-{width}-{steps}.pt"
    torch.manual_seed(0)
    model = Characters(len(text.characters), width)
    if file.exists():
        held = torch.load(file, weights_only=True)
        model.load_state_dict(held["state"])
        return model.eval(), held["seconds"]
    start = time.process_time()
    _train(model, text, steps)
    seconds = time.process_time() - start
    cache.mkdir(parents=True, exist_ok=True)
    torch.save({"state": model.state_dict(), "seconds": seconds}, file)
    return model.eval(), seconds


def _train(model: Characters, text: Text, steps: int) -> None:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=_RATE, betas=(0.9, 0.95), weight_decay=_DECAY, fused=True
    )
    for step, batch in enumerate(_batches(text, steps)):
        warm, done = (step + 1) / _WARM_UP, step / steps
        for group in optimizer.param_groups:
            group["lr"] = _RATE * min(warm, 0.5 * (1 + math.cos(math.pi * done)))
        with torch.autocast("cpu", torch.bfloat16):
            loss = _loss(model(batch[:, :-1]), batch[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), _LONGEST_STEP)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}: {loss.item() / math.log(2):.3f} bits per character", flush=True)


def _batches(text: Text, steps: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    pieces = torch.stack(text.training)
    for _ in range(steps):
        which = torch.randint(len(pieces), (_BATCH,), generator=generator)
        start = torch.randint(_PIECE - WINDOW, (_BATCH, 1), generator=generator)
        yield pieces[which].gather(1, start + torch.arange(WINDOW + 1))


def _loss(logits: Tensor, wanted: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten())


@torch.no_grad()
def bits_per_character(module: nn.Module, windows: Tensor) -> float:
    """Return the mean cross entropy in bits over all predictions in `[count, window + 1]`."""
    parts = windows.split(_BATCH)
    losses = [_loss(module(each[:, :-1]), each[:, 1:]) * len(each) for each in parts]
    return float(torch.stack(losses).sum()) / len(windows) / math.log(2)


def calibration(text: Text, count: int) -> Sequence[Mapping[str, Tensor]]:
    """Return windows of the training pieces as batches of inputs."""
    return [{"input_ids": each[:, :-1]} for each in text.windows(False, count).split(_BATCH)]
