"""Write adapters in the file layout of the library peft."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fxcompress.errors import PassError, UsageError
from fxcompress.rewrite.adapters import Adapter, find_adapters

if TYPE_CHECKING:
    from fxcompress.ir.program import Program

__all__ = ["save_adapter"]


def save_adapter(program: Program, folder: str | Path) -> Path:
    """Write a Program's adapters as `adapter_config.json` and `adapter_model.safetensors`.

    `peft.PeftModel.from_pretrained(model, folder)` loads them, if the model has its layers under
    the paths that they have in the Program.

    Args:
        program: A Program with adapters, pruned or not.
        folder: Where to write; made if it is not there.

    Raises:
        UsageError: There is no adapter, only some have magnitudes, or the folder cannot be written.
        PassError: What stands around an adapter is not its form any more.
    """
    from safetensors.torch import save_file

    adapters = list(find_adapters(program).values())
    if not adapters:
        raise UsageError("the Program has no adapter to save", hint="save it before lora_merge")
    magnitudes = [each.magnitude is not None for each in adapters]
    if any(magnitudes) and not all(magnitudes):
        without = adapters[magnitudes.index(False)].layer
        raise UsageError(
            "the layout has magnitudes for all adapters or for none",
            reason=f"{without} has none",
            hint="merge one of the two kinds first",
        )
    state = program.state()
    tensors = {
        f"base_model.model.{each.layer}.{key}": tensor.detach().contiguous().cpu()
        for each in adapters
        for key, tensor in _tensors(each, state)
    }
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
        text = json.dumps(_config(program, adapters), indent=2, sort_keys=True)
        (target / "adapter_config.json").write_text(text + "\n")
    except OSError as error:
        raise UsageError(f"the adapter cannot be written to {target}", reason=str(error)) from error
    return target


def _tensors(adapter: Adapter, state: dict[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    down, up = (state[f"{adapter.path}.{name}.weight"] for name in "AB")
    if adapter.op == "embedding":
        yield "lora_embedding_A", down.t()
        yield "lora_embedding_B", up
    else:
        yield "lora_A.weight", down
        yield "lora_B.weight", up
    if adapter.magnitude is not None:
        magnitude = state[adapter.magnitude]
        dims = state[adapter.weight].dim() - 2 if adapter.op.startswith("conv") else 0
        # The layout keeps a convolution's magnitudes in the shape that multiplies its result.
        yield "lora_magnitude_vector", magnitude.reshape((1, -1) + (1,) * dims if dims else (-1,))


def _config(program: Program, adapters: list[Adapter]) -> dict[str, Any]:
    ranks = Counter(each.rank for each in adapters)
    rank = ranks.most_common(1)[0][0]
    alphas = Counter(each.scale * each.rank for each in adapters)
    alpha = alphas.most_common(1)[0][0]
    functions = [each.op == "addmm" for each in adapters]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": program.name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": _dropout(program, adapters),
        "rank_pattern": {_exactly(a.layer): a.rank for a in adapters if a.rank != rank},
        "alpha_pattern": {
            _exactly(a.layer): _number(a.scale * a.rank)
            for a in adapters
            if a.scale * a.rank != alpha
        },
        "target_modules": _targets(program, adapters),
        "use_rslora": False,
        "use_dora": adapters[0].magnitude is not None,
        "fan_in_fan_out": any(functions),
        "init_lora_weights": True,
        "bias": "none",
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _exactly(path: str) -> str:
    """Return a pattern that fits one layer: the layout lets any prefix stand before it."""
    return f"^{re.escape(path)}"


def _targets(program: Program, adapters: list[Adapter]) -> list[str] | str:
    """Return the layers; as one expression where a name would also fit the end of another."""
    layers = [each.layer for each in adapters]
    known = [path for path, _ in program.module.named_modules() if path and path not in layers]
    if any(path.endswith(f".{layer}") for path in known for layer in layers):
        return "|".join(re.escape(layer) for layer in layers)
    return layers


def _dropout(program: Program, adapters: list[Adapter]) -> float:
    """Return the dropout before A, the same for all adapters.

    Raises:
        PassError: It is not.
    """
    found = set()
    for node in program.graph.find_nodes(op="call_module"):
        path, _, leaf = str(node.target).rpartition(".")
        if leaf == "dropout" and any(path == each.path for each in adapters):
            found.add(float(getattr(program.module.get_submodule(str(node.target)), "p", 0.0)))
    if len(found) > 1:
        raise PassError("adapters have different dropout", reason=f"{sorted(found)}")
    return found.pop() if found else 0.0
