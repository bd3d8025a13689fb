"""The table: one row per loss, of one mind with the options and the documentation."""

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from fxcompress.errors import UsageError
from fxcompress.train import loss_config
from fxcompress.train.loss_config import Custom, LossConfig
from fxcompress.train.losses import LOSSES, make_terms
from tests.train.losses.cases import ALONE, CASES
from tests.train.losses.outcomes import normal, of_logits, of_taps, shapes_of, term

UNION, _ = get_args(LossConfig)
OPTIONS = {get_args(each.model_fields["use"].annotation)[0]: each for each in get_args(UNION)}
PAGE = Path(__file__).parents[3] / "docs" / "losses.md"


def test_every_option_has_a_row():
    assert {use: row.options for use, row in LOSSES.items()} == {
        use: options for use, options in OPTIONS.items() if options is not Custom
    }
    assert all((row.function is None) != (row.make is None) for row in LOSSES.values())


def test_options_say_what_a_loss_reads():
    for use, options in OPTIONS.items():
        assert options.reads <= {"output", "target", "teacher", "taps"}, use
        assert not options.projects or "taps" in options.reads, use
    needs = {use: term({"use": use}).options for use in OPTIONS if use not in ("custom", "crd")}
    compares = {use for use, options in needs.items() if options.compares}
    assert compares == set(needs) - {
        "hard_labels", "next_token", "sequence_level", "step_by_step", "mse", *ALONE
    }  # fmt: skip
    assert term({"use": "mse", "against": "teacher"}).options.needs == {"output", "teacher"}
    assert term({"use": "mse"}).options.needs == {"output", "target"}
    assert not Custom(use="custom", factory="a.py:f").compares


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_loss_reads_what_it_says(case):
    """Without the rest of the outcome it is the same."""
    (z, v), labels = case.tensors(0, 4), case.labels(0, 4)
    whole = case.outcome(z, v, labels)
    made = term(case.options, shapes_of(whole))
    expected = made.loss(whole, 0.3)
    bare = type(whole)(
        whole.output if "output" in made.options.needs else None,
        whole.teacher if "teacher" in made.options.needs else None,
        whole.batch,
        whole.target if "target" in made.options.needs else None,
        *((whole.taps, whole.teacher_taps, whole.raw_taps) if case.kind == "taps" else ()),
    )
    assert torch.equal(made.loss(bare, 0.3), expected)


def test_relations_read_taps_as_they_are_and_distances_projected_ones():
    raw, projected, teacher = normal(0, 4, 5), normal(1, 4, 7), normal(2, 4, 7)
    both = of_taps(raw, teacher)
    both = type(both)(None, None, (), None, {"a": projected}, {"a": teacher}, {"a": raw})
    for use, read in (("features", projected), ("rkd", raw), ("cka", raw)):
        expected = term({"use": use}).loss(of_taps(read, teacher), 0.0)
        assert torch.equal(term({"use": use}).loss(both, 0.0), expected)


def test_taps_are_averaged_and_chosen():
    ours = {"a": normal(0, 4, 5, 6), "b": normal(1, 4, 3, 8, 8)}
    theirs = {name: normal(2, *each.shape) for name, each in ours.items()}
    whole = of_taps(ours, theirs)
    each = {name: term({"use": "features", "taps": [name]}).loss(whole, 0.0) for name in ours}
    assert each["a"] != each["b"]
    found = term({"use": "features"}).loss(whole, 0.0)
    assert found.item() == pytest.approx((each["a"] + each["b"]).item() / 2, rel=1e-12)


@pytest.mark.parametrize("use", ["rkd", "similarity_preserving", "cka", "crd"])
def test_relations_of_tokens_to_a_vector(use):
    """The teacher may have pooled what the model has not: only tokens have padding."""
    s, t = normal(0, 5, 4, 3), normal(1, 5, 6)
    mask = torch.tensor([[1, 1, 1, 0]] * 4 + [[1, 1, 0, 0]])
    outcome = of_taps(s, t, batch={"attention_mask": mask})
    junk = of_taps(torch.where(mask[..., None] == 0, 9.0, s), t, batch={"attention_mask": mask})
    found, other = (term({"use": use}, shapes_of(each)).loss(each, 0.0) for each in (outcome, junk))
    assert torch.equal(found, other)
    target = torch.tensor([0, 1, -100, 2, 1])
    kept = target != -100
    left = of_taps(s, t, batch={"attention_mask": mask}, target=target)
    fewer = of_taps(s[kept], t[kept], batch={"attention_mask": mask[kept]})
    a, b = (term({"use": use}, shapes_of(each)).loss(each, 0.0).item() for each in (left, fewer))
    assert a == pytest.approx(b, rel=1e-9)


def test_taps_of_several_sizes_add_up_over_micro_batches():
    ours = {"a": normal(0, 6, 5, 8, 8), "b": normal(1, 6, 3, 2, 2), "c": normal(2, 6, 4)}
    theirs = {name: normal(3, *each.shape) for name, each in ours.items()}
    for use in ("features", "attention_transfer"):
        options = {"use": use, "taps": ["a", "b"]}
        total, count = term(options).total(of_taps(ours, theirs), 0.0)
        parts = [
            term(options).total(of_taps(*({k: x[part] for k, x in side.items()}
                                          for side in (ours, theirs))), 0.0)
            for part in (slice(0, 2), slice(2, 6))
        ]  # fmt: skip
        assert sum(each.item() for each, _ in parts) == pytest.approx(total.item(), rel=1e-12)
        assert sum(each for _, each in parts) == count


def test_losses_are_computed_in_float32_under_autocast():
    s, t = 300 * normal(0, 4, 64).float(), 300 * normal(1, 4, 64).float()
    for use in ("similarity_preserving", "rkd", "cka", "crd"):
        outcome = of_taps(s, t)
        made = term({"use": use}, shapes_of(outcome))
        if made.module is not None:
            made.module.float()
        expected = made.loss(outcome, 0.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(made.loss(outcome, 0.0), expected)


def test_a_function_of_ones_own_reads_taps():
    outcome = of_taps(normal(0, 4, 5), normal(1, 4, 5), batch=(normal(0, 4, 2),))
    options = Custom(use="custom", factory="own.py:gap")
    functions = {"own.py:gap": lambda o: (o.taps["a"] - o.teacher_taps["a"]).square().mean()}
    (made,) = make_terms((options,), functions)
    total, count = made.total(outcome, 0.0)
    assert made.name == "gap"
    assert count == 4
    expected = term({"use": "features"}).loss(outcome, 0.0).item()
    assert (total / count).item() == pytest.approx(expected, rel=1e-12)
    with pytest.raises(UsageError, match="returned"):
        make_terms((options,), {"own.py:gap": lambda o: o.taps["a"]})[0].loss(outcome, 0.0)
    with pytest.raises(UsageError, match="has no function"):
        make_terms((options,))


def test_the_page_has_a_row_for_each_loss():
    rows = set(re.findall(r"^\| `(\w+)`", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert set(OPTIONS) <= rows


def test_options_are_read_without_torch():
    code = "import sys, fxcompress.train.loss_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_logits_of_a_causal_model_are_shifted():
    """The logits of a place count where the target at the next does."""
    z, v = normal(0, 2, 5, 7), normal(1, 2, 5, 7)
    target = torch.tensor([[-100, -100, 3, 1, -100], [-100, 2, 2, 2, 2]])
    found = term({"use": "soft_labels", "shift": True}).loss(of_logits(z, v, target), 0.0)
    kept = (target != -100)[:, 1:]
    rows = of_logits(z[:, :-1][kept], v[:, :-1][kept])
    assert torch.equal(found, term({"use": "soft_labels"}).loss(rows, 0.0))


def test_the_public_names():
    assert set(loss_config.__all__) >= {each.__name__ for each in OPTIONS.values()}
