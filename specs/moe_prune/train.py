"""Train `mixtral.safetensors`: a CPU-minute. `python specs/moe_prune/train.py`."""

import math
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch
import torch.nn.functional as F
from model import mixtral
from safetensors.torch import save_file
from torch import nn

HERE = Path(__file__).parent
STEPS, WARM_UP, RATE, BALANCE = 1000, 50, 3e-3, 0.01


def main() -> None:
    """Write the weights beside this file."""
    file = HERE.parent / "mixture_of_depths" / "data.py"
    spec = spec_from_file_location("bible_data", file)
    assert spec is not None
    assert spec.loader is not None
    data = module_from_spec(spec)
    spec.loader.exec_module(data)
    torch.manual_seed(0)
    model = mixtral().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95))
    for step, (inputs, ids) in enumerate(data.bible(train=8 * STEPS, seed=1)["train"]):
        rate = min((step + 1) / WARM_UP, 0.5 * (1 + math.cos(math.pi * step / STEPS)))
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate
        made = model(**inputs, output_router_logits=True)
        loss = F.cross_entropy(made.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        (loss + BALANCE * made.aux_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}: perplexity {math.exp(loss.item()):.3f}", flush=True)
    save_file(model.state_dict(), HERE / "mixtral.safetensors")


if __name__ == "__main__":
    main()
