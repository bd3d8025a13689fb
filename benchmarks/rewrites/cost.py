"""What structural passes cost: on 24 layers beside capture, and planned for models of 7 billion.

python -m benchmarks.rewrites.cost
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, cast

import torch
from torch import nn

import fxcompress as fxc
from benchmarks._common import child, write_table
from benchmarks.rewrites._rows import ROWS, Row
from fxcompress._torchvision import declare_operators
from fxcompress.api import prepare
from fxcompress.errors import FxCompressError
from fxcompress.ir import Program
from fxcompress.pipeline import Context, catalog
from fxcompress.rewrite import GraphRewriter

LAYERS: Final = 24
REPEATS: Final = 3
DYNAMIC: Final = {"input_ids": {0: "batch", 1: "seq"}}
_LARGE: Final[Mapping[str, Any]] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "use_cache": False,
}  # fmt: skip
_SMALL: Final[Mapping[str, Any]] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "vocab_size": 500,
}  # fmt: skip
# Passes that no transformer is a case of.
_OTHER: Final = ("tidy.fold_batchnorm", "factorize.tucker", "factorize.cp", "factorize.depthwise")


def _evaluated(model: Any) -> nn.Module:
    model.eval()
    return cast(nn.Module, model)


def llama(**config: Any) -> nn.Module:
    """Return a Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _evaluated(LlamaForCausalLM(LlamaConfig(**config)))


def mixtral(**config: Any) -> nn.Module:
    """Return a Mixtral of eight experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return _evaluated(MixtralForCausalLM(MixtralConfig(**config)))


def bert(**config: Any) -> nn.Module:
    """Return a BERT with a classifier."""
    from transformers import BertConfig, BertForSequenceClassification

    return _evaluated(BertForSequenceClassification(BertConfig(**config)))


MODELS: Final[Mapping[str, Callable[..., nn.Module]]] = {
    "BERT": bert,
    "Llama": llama,
    "Mixtral": mixtral,
}


def small(name: str) -> tuple[Callable[[], Program], torch.Tensor]:
    """Return what captures a model of 24 layers, and an input."""
    extra = {} if name == "BERT" else {"num_key_value_heads": 2, "use_cache": False}
    ids = torch.randint(0, 500, (2, 16), generator=torch.Generator().manual_seed(0))
    model = MODELS[name](**_SMALL, **extra)
    return lambda: fxc.capture(model, (ids,), dynamic=DYNAMIC), ids


def seconds(call: Callable[[], object]) -> float:
    """Return the CPU seconds of a call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def apply(program: Program, row: Row, ids: torch.Tensor) -> None:
    """Decide, rewrite and verify: a pass without the proof on probes."""
    (step,) = row.steps
    pass_ = catalog()[row.use]()
    options = pass_.Options.model_validate_json(
        json.dumps({k: v for k, v in step.items() if k != "use"})
    )
    context = Context(data={"calibration": [(ids,)]})
    rewriter = GraphRewriter(program)
    pass_.rewrite(rewriter, pass_.decide(program, options, context))
    rewriter.finish().verify()


def small_rows() -> list[tuple[str, ...]]:
    """Return a row of the first table for each pass: seconds over those of capture."""
    found: dict[str, dict[str, str]] = {}
    for name in MODELS:
        capture, ids = small(name)
        program = capture()
        captured = statistics.median(seconds(capture) for _ in range(REPEATS))
        found.setdefault("capture, CPU s", {})[name] = f"{captured:.1f}"
        for use, row in ROWS.items():
            if use in _OTHER:
                continue
            try:
                times = [seconds(partial(apply, program, row, ids)) for _ in range(REPEATS)]
                shown = f"{statistics.median(times) / captured:.2f} ×"
            except FxCompressError:
                shown = "–"
            found.setdefault(f"`{use}`", {})[name] = shown
    return [(use, *(cells[name] for name in MODELS)) for use, cells in found.items()]


def plan(name: str) -> None:
    """Plan every pass on a large model of meta weights, and print wall seconds."""
    declare_operators()
    with torch.device("meta"):
        model = MODELS[name](**_LARGE)
        ids = torch.zeros(1, 128, dtype=torch.long)
    start = time.perf_counter()
    program = fxc.capture(model, (ids,), dynamic=DYNAMIC)
    times: dict[str, Any] = {"parameters": 0, "capture": time.perf_counter() - start}
    for use, row in ROWS.items():
        if use in _OTHER:
            continue
        start = time.perf_counter()
        try:
            times["parameters"] = prepare(list(row.steps), program).plan().original.parameters
            times[use] = time.perf_counter() - start
        except FxCompressError as error:
            times[use] = error.what
    print(json.dumps(times))


def main() -> None:
    """Measure, and write both tables."""
    declare_operators()
    write_table(
        "rewrites_cost",
        "Structural passes on 24 layers: their cost over that of capture",
        "python -m benchmarks.rewrites.cost",
        ("pass", *(f"{name}, {LAYERS} layers" for name in MODELS)),
        small_rows(),
        "CPU seconds of one thread, medians of three: deciding, rewriting and verifying, without "
        "the proof on probes; where a pass reads data, two samples of 16 tokens. – where nothing "
        "fits. Goal: at most 2 ×.",
    )
    planned = {
        name: json.loads(
            child(
                ["-c", f"from benchmarks.rewrites.cost import plan; plan({name!r})"]
            ).output.splitlines()[-1]
        )
        for name in ("Llama", "Mixtral")
    }
    rows = []
    for use in ("capture", *(use for use in ROWS if use not in _OTHER)):
        cells = [planned[name][use] for name in planned]
        rows.append((f"`{use}`", *(f"{c:.1f}" if isinstance(c, float) else "–" for c in cells)))
    heads = [f"{name}, {found['parameters'] / 1e9:.1f} G" for name, found in planned.items()]
    write_table(
        "rewrites_plan",
        "Plans of structural passes from meta weights",
        "python -m benchmarks.rewrites.cost",
        ("pass", *heads),
        rows,
        "Wall seconds for the plan of each pass alone on a Llama of 32 layers and a Mixtral of 32 "
        "layers with eight experts; nothing but shapes is there. – where nothing fits.",
    )


if __name__ == "__main__":
    main()
