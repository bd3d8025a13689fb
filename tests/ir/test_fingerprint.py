import subprocess
import sys

import torch
from torch import nn

from fxcompress.ir import find_node, hash_tensor
from tests.ir.small_models import small_cnn, small_transformer


def test_stable_in_another_process_and_under_other_fx_names():
    program = small_cnn()
    for place, node in enumerate(program.nodes):
        node._rename(f"other_{place}")
    code = "from tests.ir.small_models import small_cnn as f; print(f().fingerprint().structure)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == program.fingerprint().structure


def test_weights_change_alone_and_are_named():
    program = small_cnn()
    other = program.copy()
    weight = program.module.fc.weight.detach().clone()
    weight[0, 0] += 1e-6
    other.module.fc.weight = nn.Parameter(weight)
    a, b = program.fingerprint(), other.fingerprint()
    assert a.structure == b.structure
    assert a.weights != b.weights
    assert a.changed(b) == ("fc.weight",)
    assert a.short != b.short
    assert len(a.short) == 8


def test_structure_changes_alone():
    program = small_cnn()
    other = program.copy()
    find_node(other, "/silu").target = torch.relu
    a, b = program.fingerprint(), other.fingerprint()
    assert a.structure != b.structure
    assert a.weights == b.weights
    assert a.changed(b) == ()


def test_ties_belong_to_the_structure():
    from dataclasses import replace

    program = small_transformer()
    assert program.fingerprint().structure != replace(program, ties={}).fingerprint().structure


def test_tensor_hashes():
    x = torch.arange(12.0).reshape(3, 4)
    assert hash_tensor(x) == hash_tensor(x.clone())
    assert hash_tensor(x.t()) == hash_tensor(x.t().contiguous())
    assert hash_tensor(x) != hash_tensor(x.reshape(4, 3))
    assert hash_tensor(x) != hash_tensor(x.double())
    assert hash_tensor(x.to("meta")) == hash_tensor(torch.zeros(3, 4, device="meta"))
    assert hash_tensor(x.to("meta")) != hash_tensor(x)
    assert hash_tensor(torch.tensor(1.0, dtype=torch.bfloat16)) != hash_tensor(torch.tensor(1.0))
    large = torch.zeros(5_000_000)
    changed = large.clone()
    changed[-1] = 1
    assert hash_tensor(large) != hash_tensor(changed)
