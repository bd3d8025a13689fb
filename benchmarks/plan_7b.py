"""`plan` on a 7-billion-parameter Llama shape from meta weights: time and resident memory.

Four blocks are skipped, a quarter of the neurons and key-value groups goes, weights become bf16.

python -m benchmarks.plan_7b
"""

from __future__ import annotations

import time

from benchmarks._common import child, own_peak, write_table

PASSES = [
    {"use": "depth.skip_blocks", "blocks": ["model.layers.*"], "layers": [24, 25, 26, 27]},
    {"use": "prune.channels", "kinds": ["neuron", "kv_group"], "ratio": 0.25, "round_to": 2},
    {"use": "tidy.cast", "dtype": "bfloat16"},
]


def measure() -> None:
    """Plan in this process and print the figures."""
    import torch

    import fxcompress as fxc
    from fxcompress._torchvision import declare_operators
    from fxcompress.api import prepare

    declare_operators()
    from transformers import LlamaConfig, LlamaForCausalLM

    start = time.perf_counter()
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32000, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
        ids = torch.zeros(1, 128, dtype=torch.long)
    built = time.perf_counter()
    program = fxc.capture(model, (ids,), dynamic={"input_ids": {0: "batch", 1: "seq"}})
    captured = time.perf_counter()
    plan = prepare(PASSES, program).plan()
    planned = time.perf_counter()
    parameters = plan.original.parameters
    print(parameters, built - start, captured - built, planned - captured, own_peak())


def main() -> None:
    result = child(["-c", "from benchmarks.plan_7b import measure; measure()"])
    parameters, built, captured, planned, peak = map(float, result.output.split()[-5:])
    write_table(
        "plan_7b",
        "Plan of a 7-billion-parameter Llama shape from meta weights",
        "python -m benchmarks.plan_7b",
        ("step", "wall s"),
        [
            ("build on meta", f"{built:.1f}"),
            ("capture", f"{captured:.1f}"),
            ("plan", f"{planned:.1f}"),
            ("whole process", f"{result.seconds:.1f}"),
        ],
        f"{parameters / 1e9:.2f} G parameters; peak resident {peak / 2**30:.2f} GiB. "
        "Goal: plan ≤ 60 s, resident ≤ 2 GB.",
    )


if __name__ == "__main__":
    main()
