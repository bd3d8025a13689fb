"""What `train.fit` refuses, in a plan already where it can, and what a failure leaves."""

import json

import pytest
import torch

from fxcompress.errors import (
    DataError,
    NumericsError,
    PassError,
    SelectorError,
    SpecError,
    UsageError,
)
from fxcompress.pipeline import Context
from passes.train.fit import Fit
from tests.passes.support import apply
from tests.passes.train.digits import digits, run, small, step


def test_a_plan_says_what_will_be_trained_and_checks_the_recipe():
    decision = apply(Fit, small(), {"epochs": 3}, Context(planning=True)).decision
    assert decision.pending == (
        "10 tensors (5,114 parameters): known after training (3 epochs on train)",
    )
    for options, message in [
        ({"optimizer": {"use": "Adamm"}}, "did you mean `Adam`"),
        ({"optimizer": {"use": "SGD", "momentun": 0.9}}, "did you mean `momentum`"),
        ({"optimizer": {"use": "LBFGS"}}, "calls the loss several times"),
        ({"optimizer": {"use": "SGD", "momentum": -1.0}}, "Invalid momentum"),
        ({"scheduler": {"use": "CosineAnealingLR"}}, "did you mean `CosineAnnealingLR`"),
        ({"scheduler": {"use": "StepLR"}}, "StepLR needs `step_size`"),
        ({"scheduler": {"use": "LambdaLR"}}, "torch has no scheduler `LambdaLR`"),
        ({"scheduler": {"use": "OneCycleLR", "max_lr": 0.1, "warmup": 3}}, "takes no `warmup`"),
    ]:
        with pytest.raises(UsageError) as caught:
            apply(Fit, small(), {"epochs": 3, **options}, Context(planning=True))
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": None}, "say how long to train"),
        ({"losses": [{"use": "soft_labels"}]}, "say `teacher: original`"),
        ({"teacher": "original"}, "no loss compares with the teacher"),
        ({"losses": [{"use": "hard_label"}]}, "unknown `hard_label`"),
        ({"losses": [{"use": "mse", "smoothing": 0.1}]}, "unknown key"),
        ({"epoch": 3}, "unknown key"),
        (
            {
                "teacher": "original",
                "losses": [{"use": "soft_labels", "temperature": {"from": 4, "to": 0}}],
            },
            "a temperature is above 0",
        ),
    ],
)
def test_options_that_contradict_are_refused(options, message):
    with pytest.raises(SpecError) as caught:
        run(options)
    assert message in str(caught.value)


def test_targets_that_match_nothing_are_refused():
    with pytest.raises(SelectorError, match=r"write `fc\.\*`") as caught:
        run({"targets": ["fc"]})
    assert "holds 2 candidates" in str(caught.value)
    with pytest.raises(SelectorError, match="10 nodes are selected"):
        run({"expect": 3})


def test_a_loss_that_is_no_number_names_the_step_and_keeps_the_last_good_state(tmp_path):
    data = digits()
    (x,), y = data["train"][-1]
    data["train"] = [*data["train"][:-1], ((x * float("nan"),), y)]
    options = {"shuffle": "none", "snapshot": 10}
    with pytest.raises(NumericsError, match=r"the loss is nan in step 19, epoch 1") as caught:
        run(options, data=data, run_dir=tmp_path)
    assert "step-00000010" in str(caught.value)
    found = json.loads(next((tmp_path / "scratch").rglob("training.json")).read_text())
    assert found["step"] == 10


def test_data_that_do_not_fit_are_refused():
    data = digits()
    with pytest.raises(DataError, match="there is no split tune"):
        run({"split": "tune"})
    unlabelled = {**data, "train": [batch for batch, _ in data["train"]]}
    with pytest.raises(DataError, match="no labels"):
        run(data=unlabelled)
    wrong = {**data, "train": [(batch, target + 1) for batch, target in data["train"]]}
    with pytest.raises(DataError, match="none of the 10 classes"):
        run(data=wrong)


def test_a_failure_leaves_a_spec_that_names_every_option(tmp_path):
    from ruamel.yaml import YAML

    data = digits()
    data["train"] = [((torch.full((4, 1, 8, 8), float("nan")),), torch.zeros(4).long())]
    losses = [{"use": "hard_labels", "smoothing": 0.1, "weight": {"from": 1.0, "to": 0.5}}]
    with pytest.raises(NumericsError):
        run({"losses": losses}, data=data, run_dir=tmp_path)
    (spec,) = YAML(typ="safe", pure=True).load(tmp_path / "failure/spec.yaml")["passes"]
    assert spec == {**step(losses=losses, optimizer={"lr": 3e-3}), "id": "fit"}


def test_nothing_is_changed_by_a_learning_rate_that_moves_nothing():
    options = {
        "epochs": 1, "batch_norm": "frozen", "optimizer": {"use": "SGD", "lr": 1e-30},
    }  # fmt: skip
    with pytest.raises(PassError, match="changes nothing"):
        run(options)
