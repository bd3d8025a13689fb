"""Adapters in PEFT's file layout. The files here were written by peft 0.21, outputs included."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fxcompress.errors import SelectorError, UsageError
from fxcompress.ir import capture
from fxcompress.rewrite import find_adapters, save_adapter
from passes.factorize.lora import Lora
from tests.passes.factorize.adapted import disturb
from tests.passes.support import apply

FILES = Path(__file__).parent / "peft_files"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.fc = nn.Embedding(7, 6), nn.Linear(6, 6)
        self.conv, self.head = nn.Conv1d(6, 5, 3, padding=1), nn.Linear(5, 3)
        self.out = nn.ModuleList([nn.Linear(3, 4)])

    def forward(self, ids):
        x = torch.relu(self.fc(self.embed(ids)))
        x = torch.relu(self.conv(x.transpose(1, 2))).mean(2)
        return self.out[0](self.head(x))


def reference(kind):
    """Return the model that an adapter was made for, its inputs, and what the library computes."""
    saved = load_file(FILES / kind / "reference.safetensors")
    model = Net().eval()
    model.load_state_dict({n[5:]: t for n, t in saved.items() if n.startswith("base.")})
    return capture(model, (saved["ids"],)), saved["ids"], saved["out"]


@pytest.mark.parametrize("kind", ["plain", "dora", "rs"])
def test_files_of_the_library_give_its_outputs(kind):
    program, ids, wanted = reference(kind)
    adapted = apply(Lora, program, {"adapter": str(FILES / kind)})
    torch.testing.assert_close(adapted.program(ids), wanted, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(program(ids), wanted, atol=1e-2)
    ranks = {a.layer: a.rank for a in find_adapters(adapted.program).values()}
    assert ranks == {"embed": 2, "fc": 1, "conv": 2, "out.0": 2}
    assert adapted.decision.dora == (kind == "dora")


@pytest.mark.parametrize("kind", ["plain", "dora", "rs"])
def test_what_is_written_has_the_librarys_keys_shapes_and_values(kind, tmp_path):
    adapted = apply(Lora, reference(kind)[0], {"adapter": str(FILES / kind)}).program
    save_adapter(adapted, tmp_path / "out")
    mine, its = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (tmp_path / "out", FILES / kind)
    )
    assert mine.keys() == its.keys()
    assert all(torch.equal(mine[name], its[name]) for name in its)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    known = json.loads((FILES / kind / "adapter_config.json").read_text())
    assert config.keys() <= known.keys()
    assert (config["peft_type"], config["r"], config["use_dora"]) == ("LORA", 2, kind == "dora")
    assert sorted(config["target_modules"]) == sorted(known["target_modules"])


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"rslora": True, "ranks": {"fc": 3}}])
def test_what_is_written_is_read_again(options, tmp_path):
    program, ids, _ = reference("plain")
    adapted = disturb(apply(Lora, program, options).program)
    save_adapter(adapted, tmp_path)
    again = apply(Lora, program, {"adapter": str(tmp_path)}).program
    assert torch.equal(again(ids), adapted(ids))


def test_a_name_that_ends_another_is_written_as_an_expression(tmp_path):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)
            self.inner = nn.Sequential()
            self.inner.fc = nn.Linear(3, 3)

        def forward(self, x):
            return self.inner.fc(self.fc(x))

    program = capture(Nested(), (torch.zeros(2, 3),))
    save_adapter(apply(Lora, program, {"targets": ["fc"]}).program, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == "fc"


def _copy(tmp_path, change=None, tensors=None):
    config = json.loads((FILES / "plain" / "adapter_config.json").read_text()) | (change or {})
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = load_file(FILES / "plain" / "adapter_model.safetensors")
    save_file(tensors(found) if tensors else found, tmp_path / "adapter_model.safetensors")
    return {"adapter": str(tmp_path)}


def _moved(found):
    return {name.replace(".fc.", ".fcc."): tensor for name, tensor in found.items()}


def _wide(found):
    name = "base_model.model.fc.lora_A.weight"
    return found | {name: torch.zeros(1, 9)}


def _half(found):
    return {name: tensor for name, tensor in found.items() if "fc.lora_B" not in name}


def _other(found):
    return found | {"base_model.model.fc.lora_B.bias": torch.zeros(6)}


@pytest.mark.parametrize(
    ("change", "tensors", "error", "says"),
    [
        ({"peft_type": "IA3"}, None, UsageError, "describes IA3, not LORA"),
        ({"bias": "all"}, None, UsageError, "trains more than low-rank products"),
        (None, _moved, SelectorError, "for a layer fcc, which is not there"),
        (None, _wide, UsageError, "does not fit its weight"),
        (None, _half, UsageError, "too much or too little"),
        (None, _other, UsageError, "holds base_model.model.fc.lora_B.bias"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, change, tensors, error, says):
    with pytest.raises(error, match=says):
        apply(Lora, reference("plain")[0], _copy(tmp_path, change, tensors))


def test_a_folder_without_an_adapter(tmp_path):
    program = reference("plain")[0]
    with pytest.raises(UsageError, match=r"adapter_config\.json cannot be read"):
        apply(Lora, program, {"adapter": str(tmp_path / "none")})
    _copy(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UsageError, match=r"adapter_model\.safetensors cannot be read"):
        apply(Lora, program, {"adapter": str(tmp_path)})
    with pytest.raises(UsageError, match="no adapter to save"):
        save_adapter(program, tmp_path / "x")
