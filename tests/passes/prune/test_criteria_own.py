"""Criteria of the user's own, and the options that name one."""

import numpy as np
import pytest
from pydantic import ValidationError

from fxcompress.errors import UsageError
from fxcompress.pipeline.context import Context
from passes.prune._criteria.options import Criterion
from passes.prune._criteria.score import score

OWN = """
import torch

def rows(program, analysis, axes, context, power=1.0):
    state = program.state()
    return {axis.name: state[axis.places[0].tensor].abs().pow(power).flatten(1).sum(1)
            for axis in axes}

def short(program, analysis, axes, context):
    return {axis: [1.0] for axis in axes}

def nothing(program, analysis, axes, context):
    return {}
"""


@pytest.fixture
def own(tmp_path, plain):
    (tmp_path / "criteria.py").write_text(OWN)

    def run(name, **args):
        criterion = Criterion(factory=f"criteria.py:{name}", args=args)
        axis = plain.axis("conv1.weight[0]")
        context = Context(folder=tmp_path)
        return score(plain.program, plain.analysis, [axis], criterion, context)[axis]

    return run


def test_a_factory_scores(own, plain):
    wanted = plain.model.conv1.weight.detach().square().sum((1, 2, 3))
    np.testing.assert_allclose(own("rows", power=2.0), wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("short", {}, r"shape \(1,\)"),
        ("nothing", {}, "no scores for axis"),
        ("absent", {}, "has no `absent`"),
        ("rows", {"powr": 2.0}, "do not fit"),
        ("rows", {"power": "x"}, "failed"),
    ],
)
def test_a_factory_that_is_wrong_says_why(own, name, args, message):
    with pytest.raises(UsageError, match=message):
        own(name, **args)


def test_options_name_one_criterion():
    assert Criterion.model_validate_json('{"factory": "a.py:f", "args": {"k": 1}}').args == {"k": 1}
    assert Criterion.model_validate_json('{"name": "l1", "roles": ["in"]}').roles == ("in",)
    for wrong in ('{"factory": "a.py:f", "name": "l1"}', '{"args": {"k": 1}}', '{"name": "l3"}'):
        with pytest.raises(ValidationError):
            Criterion.model_validate_json(wrong)
