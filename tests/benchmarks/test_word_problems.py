# SPDX-License-Identifier: Apache-2.0
"""The word problems, their teacher and their judge.

Mutations that turned a test red: listed at the end of each test's docstring.
"""

import random
import re
from dataclasses import replace

import pytest

from benchmarks.models.word_problems import (
    ANSWERS_EARLY,
    PROBE,
    Problem,
    WordProblems,
    _single,
    solution_text,
)
from benchmarks.models.word_texts import LANGUAGES, TEXTS

TASK = WordProblems()

TOM = Problem(
    "Tom has 12 apples. He gets 3 boxes of 4 apples. He loses 5.\n", "19", "en",
    {"name": "Tom", "he": "He", "item": "apples", "of": "", "other": "Kate"}, 12, (("boxes", (3, 4)), ("-", 5)),
)  # fmt: skip

WHOLE = ["In all they hold 3 * 4 = 12 apples.", "Together there are 12 + 12 = 24 apples.",
         "Then 24 - 5 = 19 apples are left.", "#### 19"]  # fmt: skip


def demonstrations(size, seed=0):
    rng = random.Random(seed)
    return [(p, TASK.demonstration(p, rng)) for p in TASK.problems(size, seed, held_out=False)]


def text_of(lines):
    return solution_text([line.text for line in lines])


def test_problems_are_split_by_hash_and_alternate_languages():
    """Red: `held_out` ignored; the languages drawn instead of taken in turn."""
    train, held = (TASK.problems(200, 5, held_out=side) for side in (False, True))
    assert not {p.prompt for p in train} & {p.prompt for p in held}
    assert {p.prompt for p in TASK.problems(200, 6, held_out=True)}.isdisjoint(p.prompt for p in train)
    assert [p.language for p in held[:4]] == ["en", "zh", "en", "zh"] and len({p.prompt for p in held}) == 200
    assert held == TASK.problems(200, 5, held_out=True) != TASK.problems(200, 6, held_out=True)


def test_two_to_four_operations_on_small_whole_numbers():
    """Red: a half of an odd number allowed; MOST not looked at."""
    for p in TASK.problems(300, 0, held_out=True):
        assert 2 <= len(_single(p.ops)) <= 4 and p.prompt.endswith("\n") and p.prompt.count("\n") == 1
        state = p.start
        for kind, number in p.ops:
            assert kind != "/" or state % 2 == 0
            state = {"+": lambda s, n: s + n, "-": lambda s, n: s - n, "*": lambda s, n: s * n,
                     "/": lambda s, n: s // n, "boxes": lambda s, n: s + n[0] * n[1]}[kind](state, number)  # fmt: skip
            assert 1 <= state <= 60
        assert str(state) == p.answer


def test_every_number_of_the_problem_is_told():
    """Red: the sentence of boxes without {b}."""
    for p in TASK.problems(200, 1, held_out=True):
        told = re.findall(r"\d+", p.prompt)
        wanted = [p.start]
        for kind, number in p.ops:
            wanted += list(number) if kind == "boxes" else [number] if kind != "/" else []
        assert told == [str(n) for n in wanted], p.prompt


def test_the_shortest_solution_is_right_and_needed_as_a_whole():
    """Red: the boxes' addition not matched after a product; the answer's line not needed."""
    for p in TASK.problems(300, 2, held_out=True):
        text = solution_text(TASK.minimal(p))
        review = TASK.review(p, text)
        assert review.correct and review.skipped == 0 and review.steps == len(_single(p.ops)) + 1
        assert all(line.needed for line in TASK.labels(p, text))


def test_the_judge_sees_the_teachers_labels():
    """Red: "Let me check" counted as applying; a repeat counted as applying."""
    alike = total = 0
    for p, lines in demonstrations(400):
        given, found = [line.needed for line in lines], [line.needed for line in TASK.labels(p, text_of(lines))]
        total += 1
        alike += given == found
    # a slip that makes a sum equal to the product of boxes can read as another operation
    assert alike / total > 0.98


def test_the_teacher_is_wordy_and_sometimes_wrong():
    """Red: SLIP 0; MENDS 0; ANSWERS_EARLY 0; AFTER_LAST ((0, 1),)."""
    made = demonstrations(600, 3)
    reviews = [TASK.review(p, text_of(lines)) for p, lines in made]
    needed = sum(line.needed for _, lines in made for line in lines) / sum(len(lines) for _, lines in made)
    assert 0.4 < needed < 0.6
    assert 0.8 < sum(r.correct for r in reviews) / 600 < 0.95
    assert 0.02 < sum(r.skipped > 0 for r in reviews) / 600 < 4 * ANSWERS_EARLY
    fixed = [r.correct for (p, lines), r in zip(made, reviews, strict=True)
             if any(line.text.startswith(("Wait, that", "不对")) for line in lines)]  # fmt: skip
    assert fixed and 0.7 < sum(fixed) / len(fixed)
    for language in LANGUAGES:
        told = "".join(text_of(lines) for p, lines in made if p.language == language)
        texts = TEXTS[language]
        for sentence in (*texts.opening, *texts.doubt, texts.check, texts.mend, texts.repeat):
            assert re.split(r"\{", sentence)[0] in told, sentence


@pytest.mark.parametrize(
    "lines, correct, skipped",
    [
        (WHOLE, True, 0),
        ([*WHOLE[:2], "#### 19"], True, 1),
        (["#### 19"], True, 3),
        ([*WHOLE[:3], "#### 18"], False, 0),
        ([*WHOLE[:3], "The answer is 19"], False, 0),
        ([*WHOLE[:3], "Let me check: 24 - 5 = 19.", "So 24 - 5 = 19.", WHOLE[3]], True, 0),
        (["Let me check: 24 - 5 = 19.", "So 24 - 5 = 19.", WHOLE[3]], True, 3),
        (["In all they hold 3 * 4 = 13 apples.", "Wait, that is wrong: 3 * 4 = 12.", *WHOLE[1:]], True, 0),
        (["In all they hold 3 * 4 = 13 apples.", "Together there are 12 + 13 = 25 apples.",
          "Then 25 - 5 = 20 apples are left.", "#### 20"], False, 0),
        ([*WHOLE[:2], "Then 24 - 6 = 18 apples are left.", "#### 18"], False, 1),
        ([], False, 3),
    ],
)  # fmt: skip
def test_review(lines, correct, skipped):
    """Red: the right operand not compared; the product not mended by a check; skipped from any order."""
    review = TASK.review(TOM, solution_text(lines))
    assert (review.correct, review.skipped, review.steps) == (correct, skipped, len(lines))


def test_a_line_written_twice_applies_once():
    """Red: the equation before not compared."""
    twice = replace(TOM, start=20, ops=(("-", 5), ("-", 5)), answer="10")
    first, second = "Then 20 - 5 = 15 apples are left.", "Then 15 - 5 = 10 apples are left."
    assert TASK.review(twice, solution_text([first, second, "#### 10"])).skipped == 0
    assert TASK.review(twice, solution_text([first, first, "#### 10"])).skipped == 1
    labels = TASK.labels(twice, solution_text([first, first, second, "#### 10"]))
    assert [line.needed for line in labels] == [True, False, True, True]


def test_operations_count_in_the_problems_order():
    """Red: sets compared in place of sequences; operations before one that was applied still wanted."""
    text = solution_text([WHOLE[2], WHOLE[0], WHOLE[1], "#### 19"])
    assert TASK.review(TOM, text).skipped == 1
    assert [line.needed for line in TASK.labels(TOM, text)] == [True, False, False, True]


def test_labels_name_the_needed_steps():
    """Red: every equation needed; the first answer needed and not the last."""
    lines = [WHOLE[0], "So 3 * 4 = 12.", *WHOLE[1:3], "Then 24 - 5 = 19 apples are left.", "#### 18", "#### 19"]
    found = [line.needed for line in TASK.labels(TOM, solution_text(lines))]
    assert found == [True, False, True, True, False, False, True]


def test_reward_reads_the_last_answer():
    """Red: partition in place of rpartition; an answer with words after it accepted."""
    assert TASK.reward("", f"{PROBE} 18\n{PROBE} 19", "19") == 1.0
    assert TASK.reward("", f"{PROBE} 19 apples", "19") == TASK.reward("", "19", "19") == 0.0
    assert TASK.reward("", f"{PROBE} 119", "19") == 0.0


def test_unknown_language():
    with pytest.raises(ValueError, match="languages: expected some of"):
        WordProblems(("fr",))
