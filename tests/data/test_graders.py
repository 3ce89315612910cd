# SPDX-License-Identifier: Apache-2.0
"""Graders: what counts as the same answer, and how the answers of a probe are handed to them.

Mutations of sspo_ext/train/grade.py that turned a test red: gold answers parsed as they are (9 cases of
test_math_verify*); probe answers graded only with the probe's text before them
(test_ready_made_graders_take_them_after_any_probe, test_the_trainers_default_grader_and_probe_agree); of TRL's form:
columns left out, chat completions as texts, unfinished completions graded too, a scalar or short list taken
(TestTRLsForm).
"""

import pytest

pytest.importorskip("transformers")
from helpers.rl import ROWS, Says, make_tokenizer, make_trainer

from sspo_ext.data.graders import answer_grader, grade, grade_rows, load_grader
from sspo_ext.signals.probing.texts import PROBES, Probe

HALF = "\\frac{1}{2}"


@pytest.mark.parametrize(
    "answer, completion, expected",
    [
        # LaTeX as the answer columns of MATH and its like have it: without delimiters
        ("\\sqrt{2}", "The answer is $\\sqrt{2}$", 1.0),
        ("x^2+1", "it is $1+x^2$", 1.0),
        ("(2,3)", "it is \\boxed{(2,3)}", 1.0),
        ("2\\sqrt{3}", "$2$", 0.0),
        ("2\\sqrt{3}", "$\\sqrt{12}$", 1.0),
        ("1\\frac{1}{2}", "$\\frac{1}{2}$", 0.0),
        ("\\text{Evelyn}", "\\boxed{Evelyn}", 1.0),
        # what was read before is read as before
        (26, "so 26.", 1.0),
        ("26", "25", 0.0),
        ("1,234", "$1234$", 1.0),
        ("10\\%", "$10\\%$", 1.0),
        ("10\\%", "$20$", 0.0),
        (f"${HALF}$", f"${HALF}$", 1.0),
        (f"so \\boxed{{{HALF}}}", "$0.5$", 1.0),
        (f"\\({HALF}\\)", "$0.5$", 1.0),
        ("\\$18", "$18$", 1.0),
        ("48/2 = <<48/2=24>>24\n48+24 = <<48+24=72>>72 in May.\n#### 72", "#### 72", 1.0),
        ("x=5", "$5$", 1.0),
        # "\\$" is a dollar sign in what a model writes too
        (18, "#### \\$18", 1.0),
        (18, "It costs \\$18.", 1.0),
        ("\\$18", "so $x=\\$18$", 1.0),
        ("\\sqrt{2}", "\\$3 first, then $\\sqrt{2}$", 1.0),
        ("5", "$5\\\\$", 1.0),  # a line break, and the formula's end
        ("5", "#### \\$18", 0.0),
    ],
)
def test_math_verify(answer, completion, expected):
    pytest.importorskip("math_verify")
    assert load_grader("math-verify")("", completion, answer) == expected


def test_math_verify_refuses_an_answer_without_mathematics():
    pytest.importorskip("math_verify")
    for answer, message in (("", "answer: expected a text"), ("$$", "answer: math-verify reads no mathematics in")):
        with pytest.raises(ValueError, match=message):
            load_grader("math-verify")("", "$2$", answer)


@pytest.mark.parametrize(
    "answer, completion, expected",
    [
        # GSM8K's answer column as it is: the solution, and the answer behind the marker
        ("48/2 = <<48/2=24>>24\n48+24 = 72\n#### 72", "24 + 48\n#### 72", 1.0),
        ("48/2 = <<48/2=24>>24\n48+24 = 72\n#### 72", "24 + 48\n#### 24", 0.0),
        (["#### 7", "七"], "七", 1.0),
        # a number in any spelling; a text as it is
        (26.0, "26", 1.0),
        (26.0, "#### 26.0", 1.0),
        (26, "26.0", 1.0),
        ([1, 26.0], "26", 1.0),
        (0.5, ".5", 1.0),
        (26.5, "26", 0.0),
        (26, "x", 0.0),
        ("26", "26.0", 0.0),
        (10**400, "1", 0.0),
    ],
)
def test_exact_answers_as_data_sets_have_them(answer, completion, expected):
    assert load_grader("exact")("", completion, answer) == expected
    # of a probe too
    assert answer_grader(load_grader("exact"), Probe("The answer is"))(completion, answer) == expected


def test_exact_takes_the_answer_behind_its_own_marker():
    assert load_grader("exact:答案")("", "答案 72", "24 + 48\n答案 72") == 1.0


def test_answers_that_no_completion_can_match():
    for answer in ("24 + 48\n####  ", float("nan"), float("inf")):
        with pytest.raises(ValueError, match="answer: expected a"):
            load_grader("exact")("", "72", answer)


class TestAnswersOfAProbe:
    """What `sspo-ext trace` and SSPOTrainer hand a grader in graded mode, and what a snippet of your own can."""

    @pytest.mark.parametrize("probe", (None, *PROBES.values(), Probe("So what is it:")))
    @pytest.mark.parametrize("name", ("exact", "exact:答案", "math-verify"))
    def test_ready_made_graders_take_them_after_any_probe(self, name, probe):
        if name == "math-verify":
            pytest.importorskip("math_verify")
        grade = answer_grader(load_grader(name), probe)
        assert grade("26", "26") == 1.0 and grade("25", "26") == 0.0

    def test_the_probes_text_is_part_of_a_completion(self):
        seen = []

        def boxed(prompt, completion, answer):
            seen.append((prompt, completion))
            return float(completion.endswith(f"\\boxed{{{answer}}}"))

        assert answer_grader(boxed, Probe("\\boxed{", separator=""))("26}", "26", "6 + 20?") == 1.0
        assert seen == [("6 + 20?", "26}"), ("6 + 20?", "\\boxed{26}")]

    def test_several_accepted_answers(self):
        grade = answer_grader(load_grader("exact"))
        assert grade("so\n#### 七", ["7", "七"]) == 1.0 and grade("#### 8", ["7", "七"]) == 0.0
        with pytest.raises(TypeError, match="grader: expected a number, got None"):
            answer_grader(lambda *a: None)("26", "26")

    def test_the_trainers_default_grader_and_probe_agree(self, tmp_path, monkeypatch):
        from sspo_ext.signals.probing import graded
        from sspo_ext.train.experience import Rollout

        tokenizer = make_tokenizer()
        said = iter(["26", "25"] * 4)
        monkeypatch.setattr(
            graded, "sample_branches", lambda *a, **o: [[tokenizer(next(said)).input_ids] for _ in a[2]]
        )
        trainer = make_trainer(
            tmp_path, tokenizer=tokenizer, reward_func=load_grader("exact"), probe="en",
            probe_options={"mode": "graded"},
        )  # fmt: skip
        steps = [tokenizer("6+13=19\n").input_ids] * 3
        rollout = Rollout({"prompt": "6+13+7=\n", "answer": 26}, [5], sum(steps, []), "", True, steps)
        assert trainer.step_values([rollout]) == [[1.0, 0.0, 1.0, 0.0]]


class TestTRLsForm:
    """`reward(prompts, completions, **columns) -> list`, one call for all rows."""

    CHAT = [{"prompt": [{"role": "user", "content": f"{a}?"}], "answer": a, "level": i} for i, a in enumerate("bd")]

    def test_one_call_with_every_column(self):
        calls = []

        def reward(prompts, completions, **columns):
            calls.append((prompts, completions, columns))
            return [len(text) for text in completions]

        rows = [{"prompt": "a", "answer": 1, "level": 3}, {"prompt": "b", "answer": 2, "level": 4}]
        assert grade_rows(reward, rows, ["x", "xyz"], trainer_state="state") == [1.0, 3.0]
        columns = {"answer": [1, 2], "level": [3, 4], "trainer_state": "state"}
        assert calls == [(["a", "b"], ["x", "xyz"], columns)]
        assert grade_rows(reward, [], []) == [] and len(calls) == 1

    def test_chat_prompts_have_chat_completions(self):
        def reward(completions, answer, **_):
            return [float(message["content"] == a and message["role"] == "assistant")
                    for (message,), a in zip(completions, answer, strict=True)]  # fmt: skip

        assert grade_rows(reward, self.CHAT, ["b", "c"]) == [1.0, 0.0]
        # a single completion, as `sspo-ext trace` and the graded probe have them
        assert grade(reward, self.CHAT[0]["prompt"], "b", "b") == 1.0
        assert answer_grader(reward)("b", ["c", "b"], self.CHAT[0]["prompt"]) == 1.0

    def test_trls_own(self):
        rewards = pytest.importorskip("trl.rewards")
        rows = [{**row, "solution": "$2$"} for row in self.CHAT]
        assert grade_rows(rewards.accuracy_reward, rows, ["\\boxed{2}", "\\boxed{3}"]) == [1.0, 0.0]
        overlong = rewards.get_soft_overlong_punishment(max_completion_len=4, soft_punish_cache=2)
        assert grade_rows(overlong, rows, ["", ""], completion_ids=[[1], [1] * 3]) == [0.0, -0.5]

    @pytest.mark.parametrize("found", (0.5, [0.5], [0.5] * 3, None))
    def test_a_reward_for_each_completion(self, found):
        with pytest.raises(ValueError, match="grader: expected a reward for each of 2 completions, got"):
            grade_rows(lambda completions, **_: found, self.CHAT, ["", ""])

    def test_none_is_nothing(self):
        assert grade_rows(lambda completions, **_: [1, None], self.CHAT, ["", ""]) == [1.0, 0.0]
        with pytest.raises(TypeError, match="grader: expected a number, got None"):
            grade_rows(lambda prompt, completion, answer: None, self.CHAT, ["", ""])

    @pytest.mark.parametrize("name", ("prompts", "completions", "completion_ids"))
    def test_known_by_any_of_its_names(self, name):
        scope = {}
        exec(f"def reward({name}, **_): return [len(x) for x in {name}]", scope)
        rows = [{"prompt": "ab", "answer": 0}, {"prompt": "ab", "answer": 0}]
        assert grade_rows(scope["reward"], rows, ["ab", "cd"], completion_ids=[[1, 2], [3, 4]]) == [2.0, 2.0]

    def test_columns_are_those_of_all_rows(self):
        rows = [{"prompt": "a"}, {"prompt": "b", "weight": 2}]
        assert grade_rows(lambda completions, weight, **_: [w or 0 for w in weight], rows, ["", ""]) == [0.0, 2.0]

    @pytest.mark.parametrize("graded", (False, True))
    def test_in_the_trainer(self, tmp_path, graded):
        seen = []

        def reward(prompts, completions, level, answer, **more):
            seen.append((prompts, completions, level, answer, more))
            return [1.0] * len(prompts)

        options = {"probe_options": {"mode": "graded", "num_samples": 1, "max_answer_tokens": 2}} if graded else {}
        rows = [{**row, "level": 7} for row in ROWS[:1]]
        tokenizer = make_tokenizer()
        engine = Says(tokenizer, ["1\n2<eos>", "3<eos>", "4", "5<eos>"])
        trainer = make_trainer(
            tmp_path, rows=rows, reward_func=reward, tokenizer=tokenizer, engine=engine, max_steps=1, **options
        )
        kept = []
        trainer.on_rollouts = kept.extend
        trainer.train()
        whole = [r for r in kept if r.ended]
        prompts, completions, level, answer, more = seen[0]
        assert sorted(completions) == sorted(r.text for r in whole) and len(whole) == 3
        assert level == [7] * len(whole) and answer == [ROWS[0]["answer"]] * len(whole)
        assert sorted(more["completion_ids"]) == sorted(r.completion_ids for r in whole)
        assert more["trainer_state"] is trainer.state
        assert [r.reward for r in kept] == [float(r.ended) for r in kept]
        assert all(call[2] == [7] * len(call[1]) for call in seen) and (len(seen) > 1) == graded
