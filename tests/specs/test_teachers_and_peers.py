"""The examples self_distillation, assistant, mutual and synthetic_data: who teaches whom."""

import pytest

from fxcompress.api import prepare
from fxcompress.spec import Spec, load_data
from tests.specs.examples import SPECS, load, needs


def spec(name: str) -> Spec:
    return Spec.load(SPECS / name / "spec.yaml")


@needs("sklearn")
class TestDigits:
    def test_the_assistant_is_an_earlier_step_and_sizes_fall(self) -> None:
        steps = spec("assistant").steps
        assert [step.id for step in steps] == ["medium", "assist", "small", "learn", "fold"]
        assert (steps[1].options.teacher, steps[3].options.teacher.step) == ("original", "assist")
        widths = [steps[place].options.model.args["width"] for place in (0, 2)]
        assert 16 > widths[0] > widths[1]

    def test_the_born_again_network_has_the_shapes_of_its_teacher_and_other_weights(self) -> None:
        job = prepare(spec("self_distillation"))
        plan = job.plan()
        assert plan.steps[0].cost.parameters == plan.original.parameters
        assert spec("self_distillation").steps[1].options.teacher == "original"

    def test_the_peer_learns_along_from_another_seed(self) -> None:
        here, peer = spec("mutual"), Spec.load(SPECS / "mutual/peer.yaml")
        teacher = here.steps[0].options.teacher
        assert (teacher.spec, teacher.learns) == ("peer.yaml", True)
        assert (here.model, here.seed) != (peer.model, peer.seed)
        (pending,) = prepare(here).plan().steps[0].pending
        assert "a peer of 5," in pending


class TestSyntheticData:
    @pytest.mark.parametrize(
        ("written", "kept"),
        [
            ("8 times 12<call>calculator(8,'*',12)<result>", True),
            ("8 times 12<call>calculator(12,'*',8)<result>", True),
            ("8 times 12<call>calculator(8,'*',13)<result>", False),
            ("8 times 12<call>calculator(8,'*'12)<result>", False),
            ("8 over 12<call>calculator(8,'/',12)<result>", False),
            ("8 times 12<result>", False),
        ],
    )
    def test_a_call_must_execute_with_the_numbers_of_the_question(
        self, written: str, kept: bool
    ) -> None:
        data = load("synthetic_data/data.py")
        encode = data.tokenizer().encode
        assert data.sensible(encode("<user>compute 8*12<think>"), encode(written)) is kept

    def test_questions_are_of_the_training_split_and_end_where_a_rationale_begins(self) -> None:
        data = load("synthetic_data/data.py")
        tokens = data.tokenizer()
        rows = [
            tokens.decode(row[mask.bool()].tolist())
            for batch in data.questions(150)
            for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        assert len(rows) == 150
        assert all(row.startswith("<user>") and row.endswith("<think>") for row in rows)
        held_out = {
            tokens.decode(row.tolist()).partition("<think>")[0]
            for batch, _ in data.labelled("eval")
            for row in batch["input_ids"]
        }
        assert not held_out & {row.removesuffix("<think>") for row in rows}

    def test_the_teacher_writes_calls_to_a_few_questions(self) -> None:
        few = ["data.questions.args.count=24"]
        split = load_data(Spec.load(SPECS / "synthetic_data/spec.yaml", few))["train"]
        tokens = load("synthetic_data/data.py").tokenizer()
        rows = [row[row >= 0].tolist() for _, t in split for row in t["teacher_labels"]]
        assert 16 <= len(rows) <= 24
        assert all(tokens.decode(row).endswith(")<result>") for row in rows)
