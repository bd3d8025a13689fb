"""Histories of passes become curves; those of rounds become one."""

from fxcompress.analysis import CostSummary
from fxcompress.pipeline.records import PassRecord, Proof
from fxcompress.report._training import trainings
from fxcompress.train import Epoch

COST = CostSummary(nodes=1, parameters=1, macs=1, bytes=4, activation_peak=1, dims={})


def record(name, epochs, speeds=(), kept=None):
    history = [
        Epoch(epoch=n, step=10 * n, samples=80, loss=1 / n, losses={"mse": 1 / n}, lr=0.1)
        for n in range(1, epochs + 1)
    ]
    decision = {"history": [each.model_dump() for each in history], "kept": kept}
    return PassRecord(
        index=1, id=name, use="train.fit", preserves="trained", version=1, options={},
        decision=decision if epochs else {}, before=COST, after=COST,
        proof=Proof(grade="structure"), measured={"samples_per_second": speeds} if speeds else {},
    )  # fmt: skip


def test_a_pass_that_trains_is_a_training_and_others_are_not():
    (found,) = trainings([record("fold", 0), record("fit", 2, (100.0, 120.0), kept=1)])
    assert found.id == "fit"
    assert [row.label for row in found.epochs] == ["1", "2"]
    assert [row.throughput for row in found.epochs] == [100.0, 120.0]
    assert found.kept == (1,)
    assert found.terms == ()


def test_rounds_are_one_training():
    first, second = record("it.1.fit", 2, kept=0), record("it.2.fit", 2, kept=1)
    joined, other = trainings([first, record("fit", 1), second])
    assert joined.id == "it.*.fit"
    assert [row.label for row in joined.epochs] == ["1.1", "1.2", "2.1", "2.2"]
    assert [row.step for row in joined.epochs] == [10, 20, 30, 40]
    assert [row.place for row in joined.epochs] == [0, 1, 2, 3]
    assert joined.kept == (0, 3)
    assert other.id == "fit"


def test_one_round_keeps_its_name():
    (found,) = trainings([record("it.1.fit", 1)])
    assert (found.id, found.epochs[0].label) == ("it.1.fit", "1")
