# SPDX-License-Identifier: Apache-2.0
"""Values from probing: worked out by hand on a fake model, equal by every engine on real classes, defined at the edges.

Mutations of sspo_ext/signals/probe.py that turned a test red: answers that begin with another are added too
(test_an_answer_that_begins_with_another_is_that_other); end of sequence kept before the probe
(test_the_end_of_sequence_is_left_out_before_the_probe).
"""

import math
import warnings
import zlib
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
from helpers.probing import BATCH, Knows, Letters
from helpers.rl import config
from helpers.tokenizer import byte_tokenizer

from benchmarks.models import families
from sspo_ext.signals.branches.support import why_not
from sspo_ext.signals.probing.probe import probe_step_values
from sspo_ext.signals.probing.texts import PROBES, Probe, as_probe
from sspo_ext.signals.split import split_text
from sspo_ext.signals.values import StepBatch

pytestmark = pytest.mark.filterwarnings("ignore")


class TestByHand:
    def test_joint(self):
        got = probe_step_values(Knows(), BATCH, [2], [[7, 8], [7]])
        assert got.to_lists() == [pytest.approx([0.1, 0.1, 0.3, 0.3]), pytest.approx([0.2])]
        assert got.steps_per_sequence.tolist() == [3, 0] and not got.values.requires_grad

    def test_mean_is_of_the_logs(self):
        got = probe_step_values(Knows(), BATCH, [2], [[7, 8], [7]], reduce="mean").to_lists()
        assert got == [pytest.approx([math.sqrt(p * 0.5) for p in (0.2, 0.2, 0.6, 0.6)]), pytest.approx([0.2])]

    def test_several_answers_that_exclude_each_other_add_up(self):
        got = probe_step_values(Knows(), BATCH, [2], [[[7, 8], [7, 9], [7, 8]], [7]]).to_lists()
        assert got[0] == pytest.approx([0.15, 0.15, 0.45, 0.45])

    def test_an_answer_that_begins_with_another_is_that_other(self):
        got = probe_step_values(Knows(), BATCH, [2], [[[7, 8], [7], [7, 9]], [7]]).to_lists()
        assert got[0] == pytest.approx([0.2, 0.2, 0.6, 0.6])

    def test_mean_of_several_is_the_largest(self):
        got = probe_step_values(Knows(), BATCH, [2], [[[7, 9], [7, 8]], [7]], reduce="mean").to_lists()
        assert got[0] == pytest.approx([math.sqrt(p * 0.5) for p in (0.2, 0.2, 0.6, 0.6)])

    def test_the_end_of_sequence_is_left_out_before_the_probe(self):
        """As if the last step were [6]; the model would answer differently after it."""

        class Ends(Knows):
            def forward(self, input_ids):
                logits = super().forward(input_ids).logits
                return SimpleNamespace(logits=logits.masked_fill((input_ids == 1).cumsum(1)[..., None] > 0, -1e4))

        assert probe_step_values(Ends(), BATCH, [2], [[7], [7]]).to_lists()[0][3] == pytest.approx(0.6)

    def test_an_impossible_answer_is_worth_nothing(self):
        got = probe_step_values(Knows(), BATCH, [2], [[8, 9, 8], [7]]).to_lists()
        assert got[0] == [0.0] * 4

    def test_a_broken_model_is_an_error(self):
        class Broken(Knows):
            def forward(self, input_ids):
                return SimpleNamespace(logits=super().forward(input_ids).logits * float("nan"))

        with pytest.raises(ValueError, match="values: expected finite"):
            probe_step_values(Broken(), BATCH, [2], [[7], [7]])


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def models(tokenizer):
    built = {}

    def get(name):
        if name not in built:
            model_class, config_class, options = families.FAMILIES[name]
            import transformers

            torch.manual_seed(0)
            sizes = {"n_positions": 1024} if name == "gpt2" else {"max_position_embeddings": 1024}
            config = getattr(transformers, config_class)(
                **options | sizes | {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 0}
            )
            built[name] = families.enlarge(getattr(transformers, model_class)(config)).eval()
        return built[name]

    return get


def chain(tokenizer, prompt, response, by="newline"):
    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    return ids(prompt), [ids(response[a:b]) for a, b in split_text(response, by)]


TEXTS = [
    ("Q: 6 + 13 + 7 = ?\n", "6 + 13 = 19\n19 + 7 = 26\nA: 26", "26"),
    ("问：三加四是多少？\n", "三加四等于七 🙂\n检查：七减四等于三 🎉\n答案：7", ["7", "七"]),
    ("Q: 🍎🍎 + 🍎?\n", "", "3"),
    ("Q: 1 + 1?\n", "no end, no line", "2"),
]


@pytest.fixture(scope="module")
def batch(tokenizer):
    return StepBatch(*zip(*(chain(tokenizer, prompt, response) for prompt, response, _ in TEXTS), strict=True))


ANSWERS = [answer for *_, answer in TEXTS]


class TestEngines:
    @pytest.mark.parametrize(
        "name, reduce",
        (("llama", "joint"), ("llama", "mean"), ("qwen2", "joint"), ("gpt2", "mean"), ("mistral", "joint")),
    )
    def test_equal_and_in_range(self, models, tokenizer, batch, name, reduce):
        options = {"tokenizer": tokenizer, "reduce": reduce}
        expected = probe_step_values(models(name), batch, "en", ANSWERS, engine="separate", **options)
        assert expected.steps_per_sequence.tolist() == [3, 3, 0, 1]
        assert ((expected.values >= 0) & (expected.values <= 1)).all() and expected.values.unique().numel() >= 5
        for engine in ("packed", "cached", "auto"):
            if engine == "cached" and why_not(models(name), engine, 200):
                continue
            got = probe_step_values(models(name), batch, "en", ANSWERS, engine=engine, max_tokens=150, **options)
            torch.testing.assert_close(got.values.log(), expected.values.log(), atol=2e-3, rtol=1e-4)

    @pytest.mark.parametrize("engine", ("packed", "cached"))
    def test_batch_order_and_company_do_not_matter(self, models, tokenizer, batch, engine):
        options = {"tokenizer": tokenizer, "engine": engine}
        whole = probe_step_values(models("llama"), batch, "zh", ANSWERS, **options).to_lists()
        turned = StepBatch(batch.prompt_ids[::-1], batch.step_ids[::-1])
        back = probe_step_values(models("llama"), turned, "zh", ANSWERS[::-1], **options).to_lists()[::-1]
        for b in range(len(batch)):
            one = StepBatch([batch.prompt_ids[b]], [batch.step_ids[b]])
            alone = probe_step_values(models("llama"), one, "zh", [ANSWERS[b]], **options).to_lists()[0]
            assert alone == pytest.approx(whole[b], rel=2e-3) and back[b] == pytest.approx(whole[b], rel=2e-3)

    def test_hundreds_of_steps(self, models, tokenizer):
        prompt, steps = chain(tokenizer, "Q\n", "".join(f"{i}\n" for i in range(120)))
        assert len(steps) == 120
        got = [
            probe_step_values(
                models("llama"), StepBatch([prompt], [steps]), [40], [[50, 51]], engine=engine, max_tokens=500
            ).values.log()
            for engine in ("packed", "cached")
        ]
        assert len(got[0]) == 121
        torch.testing.assert_close(*got, atol=2e-3, rtol=1e-4)

    def test_the_answer_in_the_chain_is_no_special_case(self, models, tokenizer):
        """Probe and answer as the chain's own next step: the tree has them once, and the value stays."""
        probe = tokenizer("\nA: ")["input_ids"]
        answer = tokenizer("26")["input_ids"]
        prompt = tokenizer("Q: 6 + 20?")["input_ids"]
        with_answer = StepBatch([prompt], [[[*probe, *answer]]])
        without = StepBatch([prompt], [[]])
        got = [probe_step_values(models("llama"), b, probe, [answer], engine="packed") for b in (with_answer, without)]
        assert got[0].to_lists()[0][0] == pytest.approx(got[1].to_lists()[0][0], rel=1e-3)


class TestTexts:
    """What the model is made to read, told from the tokens that reach it."""

    @pytest.fixture
    def read(self, tokenizer):
        class Reads(Knows):
            def forward(self, input_ids):
                texts.append(tokenizer.decode(input_ids[0]))
                return SimpleNamespace(logits=torch.zeros(*input_ids.shape, len(tokenizer)))

        texts = []

        def run(response, probe, answer, **options):
            texts.clear()
            batch = StepBatch(*([x] for x in chain(tokenizer, "问\n", response)))
            got = probe_step_values(Reads(), batch, probe, [answer], tokenizer=tokenizer, engine="separate", **options)
            return texts, got

        return run

    def test_the_probe_starts_on_a_line_of_its_own(self, read):
        texts, got = read("a = 1\nb = 2", "en", "12")
        ending = "The final answer is 1"  # the last token is predicted, not read
        assert texts == [f"问\n{ending}", f"问\na = 1\n{ending}", f"问\na = 1\nb = 2\n{ending}"]
        assert got.to_lists()[0] == pytest.approx([len(byte_tokenizer()) ** -3.0] * 3)

    def test_a_language_of_its_own(self, read):
        texts, _ = read("三加四 🙂", "zh", "7🎉")
        assert texts[1].startswith("问\n三加四 🙂\n最终答案是7")
        assert set(PROBES) >= {"en", "zh"}

    def test_ends_are_scored_with_the_answer(self, read):
        _, once = read("a\n", Probe("A:", ends=("\n",)), "7")
        _, twice = read("a\n", Probe("A:", ends=("\n", ".")), "7")
        assert twice.values.tolist() == pytest.approx((2 * once.values).tolist())

    def test_a_turn_of_the_users(self, read, tokenizer):
        tokenizer.chat_template = (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>\n{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}"
        )
        try:
            texts, _ = read("a\n", Probe("So?", separator="", turn=True), "7!")
        finally:
            tokenizer.chat_template = None
        assert texts[1] == "问\na\n</>\n<user>So?</>\n<assistant>7"

    def test_one_probe_for_each_sequence(self, models, tokenizer, batch):
        probes = ["en", "zh", Probe("So:"), "####"]
        got = probe_step_values(models("llama"), batch, probes, ANSWERS, tokenizer=tokenizer).to_lists()
        for b, probe in enumerate(probes):
            one = StepBatch([batch.prompt_ids[b]], [batch.step_ids[b]])
            alone = probe_step_values(models("llama"), one, probe, [ANSWERS[b]], tokenizer=tokenizer).to_lists()
            assert alone[0] == pytest.approx(got[b], rel=2e-3)


class TestGraded:
    def test_the_share_of_right_answers_is_their_probability(self):
        """300 answers: standard errors of .023 and .028."""
        got = probe_step_values(
            Knows(), BATCH, [2], [{"h"}, {"h", "a"}], mode="graded", tokenizer=Letters(), num_samples=300,
            max_answer_tokens=1, temperature=1.0, grader=lambda text, answer: text in answer,
        ).to_lists()  # fmt: skip
        assert got[0] == pytest.approx([0.2, 0.2, 0.6, 0.6], abs=0.1)
        assert got[1] == pytest.approx([0.2 + 0.8 / 13], abs=0.1)

    def test_temperature_0_is_one_greedy_answer(self):
        graded = []
        got = probe_step_values(
            Knows(), BATCH, [2], ["hi", "hg"], mode="graded", tokenizer=Letters(), max_answer_tokens=2, temperature=0,
            grader=lambda text, answer: graded.append(text) or text == answer,
        ).to_lists()  # fmt: skip
        assert got == [[1.0] * 4, [0.0]] and graded == ["hi"] * 5

    def test_partial_grades_and_what_is_no_grade(self):
        options = {"mode": "graded", "tokenizer": Letters(), "num_samples": 2}
        got = probe_step_values(Knows(), BATCH, [2], ["", ""], grader=lambda text, answer: 0.25, **options)
        assert got.values.tolist() == [0.25] * 5
        with pytest.raises(ValueError, match="grader: expected grades in"):
            probe_step_values(Knows(), BATCH, [2], ["", ""], grader=lambda text, answer: 2, **options)
        for name, change in (("grader", {"grader": None}), ("tokenizer", {"tokenizer": None}), ("engine", PACKED)):
            with pytest.raises(ValueError, match=f"{name}: expected"):
                arguments = {"grader": lambda text, answer: 1} | options | change
                probe_step_values(Knows(), BATCH, [2], ["", ""], **arguments)

    def test_a_grader_that_accepts_nothing_is_told(self):
        options = {"mode": "graded", "tokenizer": Letters(), "num_samples": 2}
        with pytest.warns(UserWarning, match="the grader gave 0 to every answer"):
            probe_step_values(Knows(), BATCH, [2], ["", ""], grader=lambda text, answer: 0, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            probe_step_values(Knows(), BATCH, [2], [1, 0], grader=lambda text, answer: answer, **options)

    @pytest.mark.parametrize("name", ("llama", "mistral"))
    def test_engines_are_equal(self, models, tokenizer, batch, name):
        """The grade is a hash of the text: any other answer shows."""
        options = {"tokenizer": tokenizer, "mode": "graded", "num_samples": 3, "max_answer_tokens": 4}
        options["grader"] = lambda text, answer: zlib.crc32(text.encode()) / 2**32
        engines = ["separate", "auto"] if name == "mistral" else ["separate", "cached"]
        got = [probe_step_values(models(name), batch, "en", ANSWERS, engine=e, **options) for e in engines]
        assert got[0].to_lists() == got[1].to_lists()
        one = StepBatch(batch.prompt_ids[1:2], batch.step_ids[1:2])
        alone = probe_step_values(models(name), one, "en", ANSWERS[1:2], max_tokens=1, **options)
        assert alone.to_lists()[0] == got[0].to_lists()[1]
        other = probe_step_values(models(name), one, "en", ANSWERS[1:2], seed=1, **options)
        assert other.to_lists() != alone.to_lists()


PACKED = {"engine": "packed"}


class TestErrors:
    @pytest.mark.parametrize(
        "change, message",
        (
            ({"mode": "judge"}, "mode: expected one of"),
            ({"reduce": "max"}, "reduce: expected one of"),
            ({"answers": [[7]]}, "answers: expected one for each of 2"),
            ({"answers": [[7], []]}, "answers: expected a text"),
            ({"answers": [[7], "7"]}, "answers: expected a text"),
            ({"probe": "en"}, "tokenizer: expected one"),
            ({"probe": 5}, "probe: expected a text, a Probe, token ids"),
            ({"probe": ["en"]}, "probe: expected a text, a Probe, token ids"),
            ({"engine": "packed"}, "engine: 'packed' cannot run Knows"),
            ({"max_tokens": 0}, "max_tokens: expected"),
        ),
    )
    def test_by_name(self, change, message):
        arguments = {"probe": [2], "answers": [[7], [7]]} | change
        with pytest.raises(ValueError, match=message):
            probe_step_values(Knows(), BATCH, arguments.pop("probe"), arguments.pop("answers"), **arguments)

    @pytest.mark.parametrize("text", ("jp", "Jp", "Englisch", "zh-cn", "zh_CN"))
    def test_a_language_that_is_none(self, tokenizer, tmp_path, text):
        with pytest.raises(ValueError, match="probe: expected a language"):
            config(tmp_path, probe=text)  # SSPOConfig, before anything is loaded
        for probe in (text, [text, "en"]):
            with pytest.raises(
                ValueError, match=rf"probe: expected a language \(en, zh.*got '{text}'.*Probe\('{text}'\)"
            ):
                probe_step_values(Knows(), BATCH, probe, ["7", "7"], tokenizer=tokenizer)
        assert as_probe(Probe(text)).text == text and as_probe(f"{text}:").text == f"{text}:"
        for known in ("EN", "English", "english", " en"):
            assert as_probe(known) is PROBES["en"]
        assert as_probe("\nAnswer").text == "\nAnswer" and as_probe("\nAnswer").separator == " "
        assert [as_probe(t).separator for t in ("so \\boxed{", "A: ", "A:\n", "(", "is $")] == [""] * 5
        assert as_probe("zh") is PROBES["zh"] and as_probe("####").text == "####" and as_probe("答案").text == "答案"

    def test_batches(self):
        for prompts, steps, message in (
            ([[]], [[[1]]], "prompt_ids: expected at least one token"),
            ([[1]], [[[]]], "step_ids: expected at least one token"),
            ([[1]], [], "step_ids: expected one list for each"),
        ):
            with pytest.raises(ValueError, match=message):
                StepBatch(prompts, steps)
        with pytest.raises(TypeError, match="batch: expected a StepBatch"):
            probe_step_values(Knows(), [[1]], [2], [[7]])


class TestFromTensors:
    def test_prompt_steps_padding_on_either_side(self):
        ids = torch.tensor([[0, 0, 11, 12, 13, 14], [21, 22, 23, 24, 0, 0]])
        steps = torch.tensor([[-1, -1, -1, 0, 0, 1], [-1, 0, 1, 1, -1, -1]])
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
        got = StepBatch.from_tensors(ids, steps, mask)
        assert got == StepBatch([[11], [21]], [[[12, 13], [14]], [[22], [23, 24]]])
        assert got.boundaries(0) == [1, 3, 4] and got.sequence(1) == [21, 22, 23, 24]

    def test_what_is_not_scored_stays_in_its_place(self):
        got = StepBatch.from_tensors(torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[-1, 0, -1, 0, 1]]))
        assert got == StepBatch([[1]], [[[2, 3, 4], [5]]])

    def test_decreasing_steps(self):
        with pytest.raises(ValueError, match="never decrease"):
            StepBatch.from_tensors(torch.tensor([[1, 2, 3]]), torch.tensor([[-1, 1, 0]]))
