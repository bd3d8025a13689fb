"""What a teacher writes to prompts, what of it is kept, and ROUGE-L."""

import random
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxcompress.errors import DataError, ModelError
from fxcompress.ir import capture
from fxcompress.spec import Spec, load_data
from fxcompress.train.rouge import Distinct, rouge_l
from fxcompress.train.written import from_teacher, prompts_of, write

STOP = 3


class Counter(nn.Module):
    """Says the number after the last one, modulo 10; padding is seen by nobody."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding.from_pretrained(8.0 * torch.eye(10).roll(1, 1))

    def forward(self, input_ids):
        return self.table(input_ids)


@cache
def counter():
    dynamic = {"input_ids": {0: "batch", 1: "seq"}}
    ids = torch.randint(0, 10, (2, 5))
    return capture(Counter(), (), {"input_ids": ids}, dynamic=dynamic)


def told(prompts, **options):
    return write(counter(), prompts, stop=STOP, longest=12, **options)


def test_it_writes_what_a_loop_over_single_prompts_would():
    prompts = [[1], [5, 4], [9], [2], [0, 0, 0, 8]]
    found = told(prompts, batch=2)
    assert [row.prompt for row in found.rows] == prompts
    assert [row.written for row in found.rows] == [
        [2, 3], [5, 6, 7, 8, 9, 0, 1, 2, 3], [0, 1, 2, 3], [3], [9, 0, 1, 2, 3],
    ]  # fmt: skip
    assert dict(found.dropped) == {}


def test_what_is_dropped():
    prompts = [[1], [4], [2], [1, 1], [2]]
    found = write(counter(), prompts, stop=STOP, longest=5, distinct=0.99,
                  check=lambda prompt, written: len(prompt) < 2)  # fmt: skip
    assert [row.prompt for row in found.rows] == [[1], [2]]
    assert found.dropped == {"unfinished": 1, "refused": 1, "near duplicate": 1}
    with pytest.raises(DataError, match="nothing is kept") as caught:
        write(counter(), [[4]], stop=STOP, longest=2)
    assert "1 unfinished" in str(caught.value)
    with pytest.raises(DataError, match="prompt 1 has no tokens"):
        told([[1], []])


def test_drawn_tokens_follow_the_seed_and_the_temperature():
    prompts = [[number] for number in range(10)] * 3
    first, again = (told(prompts, temperature=4.0, seed=1) for _ in range(2))
    assert first == again
    assert told(prompts, temperature=4.0, seed=2) != first
    cold = told(prompts, temperature=0.1, seed=1)
    assert cold.rows == told(prompts).rows


def test_a_split_has_the_written_tokens_as_targets():
    split = from_teacher("train", lambda: told([[5, 4], [1], [9]]), batch=2, pad=7)
    (batch, target), _ = list(split)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 7, 7], [9, 0, 1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert target["teacher_labels"].tolist() == [[-100, 2, 3, -100, -100], [-100, 0, 1, 2, 3]]
    prompts = list(prompts_of(split))
    assert prompts == [[1, 2, 3], [9, 0, 1, 2, 3], [5, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3]]
    with pytest.raises(DataError, match="are no tokens"):
        list(prompts_of([((torch.ones(1, 2),), None)]))


class TestRougeL:
    def test_known_values(self):
        assert rouge_l("police killed the gunman".split(), "police kill the gunman".split()) == 0.75
        assert rouge_l("ab", "ba") == 0.5
        assert (rouge_l("", ""), rouge_l("ab", "")) == (1, 0)

    @given(st.text("abc", max_size=8), st.text("abc", max_size=8))
    def test_it_is_symmetric_and_1_for_equals_alone(self, one, other):
        found = rouge_l(one, other)
        assert 0 <= found <= 1
        assert found == rouge_l(other, one)
        assert (rouge_l(one, other, 0.7) >= 0.7) == (found >= 0.7)
        assert (found == 1) == (one == other)

    @given(st.lists(st.text("abcd", min_size=1, max_size=6), max_size=12), st.floats(0.2, 1))
    def test_no_two_that_are_kept_are_near_and_each_dropped_one_has_a_reason(self, texts, below):
        keep = Distinct(below)
        decided = [(text, keep(text)) for text in texts]
        kept = [text for text, stays in decided if stays]
        assert all(rouge_l(a, b) < below for i, a in enumerate(kept) for b in kept[:i])
        for place, (text, stays) in enumerate(decided):
            before = [other for other, first in decided[:place] if first]
            assert stays == all(rouge_l(text, other) < below for other in before)

    def test_many_sequences_are_remembered(self):
        draw = random.Random(0)
        rows = [[draw.randrange(1000) for _ in range(6)] for _ in range(150)]
        keep = Distinct(0.9)
        assert sum(map(keep, rows)) == 150
        assert not any(map(keep, rows))


SPEC = """
fxcompress: 1
model: {factory: "model.py:counter"}
inputs: [{name: input_ids, shape: [batch, seq], dtype: int64, values: "randint(0, 10)"}]
data:
  pool: {tensors: pool.npz}
  train:
    written:
      {prompts: pool, teacher: {spec: spec.yaml}, stop: 3, longest: 12, check: "model.py:odd"}
    batch: 2
passes: []
"""
MODEL = """
from tests.train.test_written import Counter as counter
def odd(prompt, written):
    return prompt[0] % 2 == 1
"""


def test_a_spec_says_who_writes_to_which_prompts(tmp_path):
    import numpy as np

    np.savez(tmp_path / "pool.npz", input_ids=np.array([[1], [2], [5]]))
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "spec.yaml").write_text(SPEC)
    (batch, target) = next(iter(load_data(Spec.load(tmp_path / "spec.yaml"))["train"]))
    assert batch["input_ids"][0].tolist()[:3] == [1, 2, 3]
    assert len(batch["input_ids"]) == 2
    assert set(target) == {"labels", "teacher_labels"}
    text = SPEC.replace("prompts: pool", "prompts: train").replace("passes: []", "")
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(DataError, match="prompts of train, which is not before it"):
        load_data(Spec.load(tmp_path / "spec.yaml"))["train"]
    text = SPEC.replace("{spec: spec.yaml}", "{run: spec.yaml}")
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(ModelError, match="cannot be loaded"):
        list(load_data(Spec.load(tmp_path / "spec.yaml"))["train"])
