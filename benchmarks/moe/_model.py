"""A small mixture of experts, trained on the characters of a text."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quantize._characters import WINDOW, Text
from fxcompress._torchvision import declare_operators

__all__ = ["batches", "mixtral", "next_character", "trained"]

STEPS = 1000
_BATCH, _WARM_UP, _RATE = 8, 50, 3e-3
_BALANCE = 0.01


def mixtral(count: int, seed: int) -> nn.Module:
    """Return Hugging Face's Mixtral: 3 layers of 8 experts, 2 a token, 0.64 M parameters.

    Args:
        count: Different characters.
        seed: Of the initial weights.
    """
    declare_operators()
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=count, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
        router_aux_loss_coef=_BALANCE, max_position_embeddings=WINDOW, use_cache=False,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def trained(text: Text, seed: int, cache: Path) -> nn.Module:
    """Return the model in float32, trained with its balance loss; what `cache` holds is read."""
    file = cache / f"mixtral-{text.digest[:12]}-{STEPS}-{seed}.pt"
    model = mixtral(len(text.characters), seed)
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval()
    start = time.process_time()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, betas=(0.9, 0.95), fused=True)
    for step, batch in enumerate(batches(text, STEPS, seed)):
        rate = min((step + 1) / _WARM_UP, 0.5 * (1 + math.cos(math.pi * step / STEPS)))
        for group in optimizer.param_groups:
            group["lr"] = _RATE * rate
        made: Any = model(batch[:, :-1], output_router_logits=True)
        loss = next_character(made.logits, batch[:, 1:])
        (loss + _BALANCE * made.aux_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            spent = time.process_time() - start
            print(f"step {step}: {loss.item() / math.log(2):.3f} bits, {spent:.0f} s", flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), file)
    return model.eval()


def batches(text: Text, steps: int, seed: int) -> list[Tensor]:
    """Return so many random batches of training windows, `[batch, window + 1]`."""
    generator = torch.Generator().manual_seed(seed)
    pieces = torch.stack(text.training)
    found = []
    for _ in range(steps):
        which = torch.randint(len(pieces), (_BATCH,), generator=generator)
        start = torch.randint(pieces.shape[1] - WINDOW, (_BATCH, 1), generator=generator)
        found.append(pieces[which].gather(1, start + torch.arange(WINDOW + 1)))
    return found


def next_character(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean cross entropy in nats."""
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
