"""The example tool_calling: its generator, its filter, its tokens, its metric and its plan."""

import json
import random
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from fxcompress.api import prepare
from fxcompress.spec import Spec
from fxcompress.train.rouge import rouge_l
from tests.specs.examples import SPECS, load

HERE = "tool_calling"


@cache
def module(name: str) -> ModuleType:
    return load(f"{HERE}/{name}.py")


@cache
def written() -> tuple[object, ...]:
    kept, _ = module("generate").dialogues(1200, 1)
    return kept


def talk(question: str, call: str, answer: str) -> object:
    return module("generate").Dialogue(question, "why", call, answer)


class TestCalculator:
    @given(st.integers(0, 999), st.sampled_from("+-*"), st.integers(0, 999))
    def test_a_call_gives_what_python_gives(self, left: int, sign: str, right: int) -> None:
        found = module("generate").execute(f"calculator({left},'{sign}',{right})")
        assert found == {"+": left + right, "-": left - right, "*": left * right}[sign]

    @pytest.mark.parametrize(
        "call",
        [
            "",
            "96",
            "calculator(8,'*'",
            "calculator(8,'*',)",
            "calculator('8','*','12')",
            "calculator(8,'%',3)",
            "calculator(True,'+',1)",
            "calculator(8,'*',12,13)",
            "calculator(*[8,'*',12])",
            "calculator(8,'*',b=12)",
            "calculator(8,'*',2+10)",
            "abacus(8,'*',12)",
            "__import__('os').getcwd()",
            "calculator(7,'/',2)",
            "calculator(7,'/',0)",
            "calculator(\0)",
        ],
    )
    def test_anything_else_is_refused(self, call: str) -> None:
        with pytest.raises(module("generate").CallError):
            module("generate").execute(call)


class TestGenerator:
    def test_every_call_executes_to_its_answer_within_the_limits(self) -> None:
        generate = module("generate")
        for each in written():
            assert str(generate.execute(each.call)) == each.answer
            assert len(each.question) <= generate.LONGEST
            left, sign, right = generate.parse(each.call)
            assert str(left) in each.question
            assert str(right) in each.question
            assert each.rationale == generate.RATIONALES[sign].format(a=left, b=right)

    def test_all_operators_and_phrasings_are_there(self) -> None:
        generate = module("generate")
        shapes = {"".join(" " if c.isdigit() else c for c in d.question) for d in written()}
        firsts = {" ".join(shape.split()) for shape in shapes}
        wanted = [q.format(a=" ", b=" ") for each in generate.QUESTIONS.values() for q in each]
        assert firsts == {" ".join(question.split()) for question in wanted}

    def test_no_question_comes_twice_and_none_nearly_twice(self) -> None:
        generate = module("generate")
        questions = [each.question for each in written()]
        assert len(set(questions)) == len(questions)
        draw = random.Random(0)
        for one, other in (draw.sample(questions, 2) for _ in range(2000)):
            words, others = generate.split_words(one), generate.split_words(other)
            if set(words) & set(others) & {word for word in words if word.isdigit()}:
                assert rouge_l(words, others) < generate.NEAR

    def test_a_seed_always_writes_the_same(self) -> None:
        again = load(f"{HERE}/generate.py").dialogues(1200, 1)[0]
        assert [vars(each) for each in again] == [vars(each) for each in written()]
        other = module("generate").dialogues(100, 2)[0]
        assert [each.question for each in other] != [each.question for each in written()[:100]]

    def test_splits_share_no_pair_of_operands_and_lose_nothing(self) -> None:
        generate = module("generate")
        splits = generate.deal(written(), {"eval": 200, "calibration": 100, "train": 900})
        pairs = {name: {generate.pair(each) for each in part} for name, part in splits.items()}
        assert not pairs["eval"] & pairs["train"]
        assert not pairs["eval"] & pairs["calibration"]
        assert not pairs["calibration"] & pairs["train"]
        assert {name: len(part) for name, part in splits.items()} == {
            "eval": 200, "calibration": 100, "train": 900,
        }  # fmt: skip
        questions = [each.question for part in splits.values() for each in part]
        assert sorted(questions) == sorted(each.question for each in written())

    def test_lines_are_json(self) -> None:
        (line,) = module("generate").lines(written()[:1])
        assert json.loads(line) == vars(written()[0])


class TestFilter:
    @pytest.mark.parametrize(
        ("question", "call", "answer", "reason"),
        [
            ("compute 8*12", "calculator(8,'*',12)", "95", "wrong"),
            ("compute 8*12", "calculator(8,'*'", "96", "does not execute"),
            ("compute 5-9", "calculator(5,'-',9)", "-4", "out of range"),
            ("compute 8*12 " + "please " * 10, "calculator(8,'*',12)", "96", "too long"),
            ("compute 8*13", "calculator(8,'*',13)", "104", None),
        ],
    )
    def test_what_is_dropped(
        self, question: str, call: str, answer: str, reason: str | None
    ) -> None:
        assert module("generate").Filter()(talk(question, call, answer)) == reason

    def test_repetitions(self) -> None:
        keep = module("generate").Filter()
        story = "i have {} apples and get {} more. how many now?"
        assert keep(talk(story.format(8, 12), "calculator(8,'+',12)", "20")) is None
        assert keep(talk(story.format(8, 12), "calculator(8,'+',12)", "20")) == "duplicate"
        assert keep(talk(story.format(8, 13), "calculator(8,'+',13)", "21")) == "near duplicate"
        assert keep(talk(story.format(9, 13), "calculator(9,'+',13)", "22")) is None


class TestTokens:
    def test_segments_are_what_the_model_has_to_write(self) -> None:
        data = module("data")
        tokens = data.tokenizer()
        dialogue = module("generate").Dialogue(
            "compute 8*12", "8 times 12", "calculator(8,'*',12)", "96"
        )
        ids = tokens.encode(data.text(dialogue))
        kinds = data.segments(ids)
        parts = {
            kind: tokens.decode([i for i, each in zip(ids, kinds, strict=True) if each == kind])
            for kind in (1, 2)
        }
        assert parts == {1: "8times12<call>", 2: "calculator(8,'*',12)<result>96<end>"}

    def test_what_is_no_token_reads_as_padding(self) -> None:
        tokens = module("data").tokenizer()
        assert tokens.decode([len(tokens.tokens), *tokens.encode("8 + 9")]) == "<pad>8+9"
        with pytest.raises(KeyError):
            tokens.encode("divine")

    def test_every_dialogue_has_tokens_and_padding_counts_for_nothing(self) -> None:
        data = module("data")
        texts = [data.text(each) for each in written()[:100]]
        found = data.batches(texts, 32)
        assert sum(len(batch["input_ids"]) for batch, _ in found) == 100
        for batch, target in found:
            padding = batch["attention_mask"] == 0
            assert (target["labels"][padding] == -100).all()
            assert (target["segments"][padding] == 0).all()
            assert torch.equal(target["labels"][~padding], batch["input_ids"][~padding])
        decoded = {
            data.tokenizer().decode(row[: int(mask.sum())].tolist())
            for batch, _ in found
            for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        }
        assert decoded == {text.replace(" ", "") for text in texts}


class Speaker:
    """A model that says what it is given for each prompt, token by token."""

    def __init__(self, texts: Sequence[tuple[Sequence[int], str]]) -> None:
        tokens = module("data").tokenizer()
        self.size, self.think = len(tokens.tokens), tokens.ids["<think>"]
        self.says = {tuple(p): tokens.encode(said) for p, said in texts}

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits = torch.zeros(*input_ids.shape, self.size)
        for row, count in enumerate(attention_mask.sum(1).tolist()):
            ids = input_ids[row, :count].tolist()
            start = ids.index(self.think) + 1
            said = self.says[tuple(ids[:start])]
            place = count - start
            logits[row, count - 1, said[place] if place < len(said) else 0] = 1
        return logits


class TestMetric:
    def test_right_wrong_and_malformed_calls(self) -> None:
        judge = module("metric").judge
        said = [
            "8times12<call>calculator(8,'*',12)<result>",
            "8times12<call>calculator(12,'*',8)<result>",  # another way to the same result
            "8times12<call>calculator(8,'*',13)<result>",
            "7over2<call>calculator(7,'/',2)<result>",  # well formed, but has no result
            "8times12<call>calculator(8,'*'12)<result>",
            "calculator(8,'*',12)<result>",
            "8times12<call>calculator(8,'*',12)",  # never ended
            "",
        ]
        score = judge(said, [96] * len(said))
        assert (score.count, score.well_formed, score.right) == (8, 4, 2)

    def test_greedy_decoding_gives_what_the_model_says(self) -> None:
        data, metric = module("data"), module("metric")
        tokens = data.tokenizer()
        chosen = written()[:6]
        split = data.batches([data.text(each) for each in chosen], 4)
        prompts = [tokens.encode(f"<user>{each.question}<think>") for each in chosen]
        said = [f"{each.rationale}<call>{each.call}<result>" for each in chosen]
        said[0] = "calculator"  # stops making sense, and never ends
        said[1] = "1 more 1<call>calculator(0,'+',0)<result>"
        ends = [f"{each.answer}<answer>{each.answer}<end>" for each in chosen]
        ends[1] = f"0<answer>{chosen[1].answer}<end>"  # wrong call, and yet the right answer
        ends[2] = f"{chosen[2].answer}<answer>0<end>"
        texts = [one + other for one, other in zip(said, ends, strict=True)]
        speaker = Speaker(list(zip(prompts, texts, strict=True)))
        assert metric.execution_match(speaker, split) == pytest.approx(4 / 6)
        assert metric.syntax(speaker, split) == pytest.approx(5 / 6)
        assert metric.answers(speaker, split) == pytest.approx(4 / 6)


class TestModel:
    def test_the_student_has_a_seventeenth_of_the_parameters(self) -> None:
        sizes = [
            sum(p.numel() for p in build().parameters())
            for build in (module("model").teacher, module("model").student)
        ]
        assert sizes == [2_970_816, 175_584]
        assert len(module("data").tokenizer().tokens) <= module("model").VOCABULARY

    def test_the_shipped_weights_make_most_calls_right(self) -> None:
        weights = SPECS / HERE / "teacher.safetensors"
        assert weights.stat().st_size < 6_000_000
        model = module("model").teacher().eval()
        model.load_state_dict(load_file(weights))
        split = module("data").dialogues()["eval"]
        assert sum(len(batch["input_ids"]) for batch, _ in split) == 500
        assert module("metric").execution_match(model, split[:3]) > 0.95

    def test_it_sees_neither_the_future_nor_padding(self) -> None:
        torch.manual_seed(0)
        model = module("model").student().eval()
        ids = torch.randint(7, 60, (2, 9))
        mask = torch.ones_like(ids)
        with torch.no_grad():
            whole = model(ids, mask)
            mask[:, 6:] = 0
            torch.testing.assert_close(model(ids, mask)[:, :6], whole[:, :6])
            torch.testing.assert_close(model(ids[:, :6], mask[:, :6]), whole[:, :6])


def test_the_plan_distils_in_stages_and_ends_in_int8() -> None:
    plan = prepare(Spec.load(SPECS / HERE / "spec.yaml")).plan()
    assert [step.id for step in plan.basis.passes] == [
        "student", "taps", "states", "calls", "outputs", "int8",
    ]  # fmt: skip
    assert plan.result.parameters < 0.06 * plan.original.parameters
    assert plan.result.bytes < 0.02 * plan.original.bytes
