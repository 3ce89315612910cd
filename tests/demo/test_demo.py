# SPDX-License-Identifier: Apache-2.0
"""The generated tasks by hand-made examples, and the whole demo at toy size. Its measured effect is the slow test."""

import json
import random

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from sspo_ext.demo import DemoConfig, run
from sspo_ext.demo.claim import Claim, of_problems, standard_error
from sspo_ext.demo.imitate import imitate, new_model
from sspo_ext.demo.tasks import FAMILIES, LANGUAGES, Problem, Task, solution_text

SUM = Problem("7 + 5 + 8 = ? \n", "20", 7, (5, 8))
SORT = Problem("sort 7 3 12 = ? \n", "3 7 12", (7,), (3, 12))
WORD = Problem("d a c | rev | add b = ? \n", "c a d b", ("d", "a", "c"), (("rev",), ("add", "b")))


@pytest.mark.parametrize(
    "family,problem,lines",
    [
        ("sums", SUM, ["7 + 5 = 12", "12 + 8 = 20", "#### 20"]),
        ("sort", SORT, ["3 : 3 7", "12 : 3 7 12", "#### 3 7 12"]),
        ("letters", WORD, ["rev : c a d", "add b : c a d b", "#### c a d b"]),
    ],
)
def test_minimal_solution(family, problem, lines):
    assert Task(family).minimal(problem) == lines


@pytest.mark.parametrize(
    "text,correct,steps,skipped",
    [
        ("7 + 5 = 12 \n 12 + 8 = 20 \n #### 20", True, 3, 0),
        ("7 + 5 = 12 \n check 7 + 5 = 12 \n 7 + 5 = 12 \n so far 12 \n 12 + 8 = 20 \n #### 20", True, 6, 0),
        ("#### 20", True, 1, 2),
        ("12 + 8 = 20 \n #### 20", True, 2, 1),
        ("7 + 5 = 2 \n 2 + 8 = 10 \n #### 10", False, 3, 0),  # a slip is no skipped step
        ("7 + 5 = 12 \n 12 + 8 = 20", False, 2, 0),
        ("", False, 0, 2),
        ("#### 2 \n #### 20", True, 2, 2),
        ("#### 20 20", False, 1, 2),
    ],
)
def test_review(text, correct, steps, skipped):
    found = Task("sums").review(SUM, text)
    assert (found.correct, found.steps, found.skipped) == (correct, steps, skipped)


def test_the_same_operation_twice_is_no_repeat():
    task = Task("sums")
    twice = Problem("5 + 3 + 3 = ? \n", "11", 5, (3, 3))
    assert task.review(twice, "5 + 3 = 8 \n 8 + 3 = 11 \n #### 11").skipped == 0
    assert task.review(twice, "5 + 3 = 8 \n 5 + 3 = 8 \n #### 11").skipped == 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("language", LANGUAGES)
def test_every_task(family, language):
    task, rng = Task(family, language), random.Random(0)
    tokenizer = task.tokenizer()
    held_out = task.problems(40, 1, held_out=True)
    train = task.problems(200, 2, held_out=False)
    assert not {p.prompt for p in held_out} & {p.prompt for p in train}
    wrong = wordy = 0
    for p in train:
        text = solution_text(task.minimal(p))
        found = task.review(p, text)
        assert found.correct and found.skipped == 0, (p, text)
        assert task.reward(p.prompt, text, p.answer) == 1.0
        lines = task.demonstration(p, rng)
        text = solution_text(lines)
        ids = tokenizer(p.prompt + text).input_ids
        assert tokenizer.pad_token_id not in ids, text  # which is also the unknown token
        assert tokenizer.decode(tokenizer(text).input_ids) == text
        wrong += not task.review(p, text).correct
        wordy += len(lines) > len(p.ops) + 1
    assert 0.03 < wrong / len(train) < 0.35 and wordy / len(train) > 0.6


def test_slips_are_the_teachers():
    task, rng = Task("sums"), random.Random(0)
    seen = {task.slip(17, 9, rng) for _ in range(200)}
    assert {26, 16} <= seen <= {16, 24, 25, 26, 27, 28}
    assert {task.slip(2, 2, rng) for _ in range(20)} <= {2, 3, 4, 5, 6}


def test_unknown_task():
    with pytest.raises(ValueError, match="task: expected one of"):
        Task("products")


def test_imitation_learns():
    task = Task("sums")
    tokenizer = task.tokenizer()
    losses = imitate(new_model(tokenizer, hidden_size=32), tokenizer, task, steps=30, lr=3e-2, batch_size=4)
    assert sum(losses[-3:]) < sum(losses[:3]) - 1


TOY = DemoConfig(held_out=8, updates=2, prompts=2, num_generations=4)


def test_toy_run_is_whole_and_repeatable(tmp_path, capsys):
    results = []
    for name in ("a", "b"):
        result = run(tmp_path / name, TOY)
        assert (tmp_path / name / "demo.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / name / "model" / "model.safetensors").exists()
        assert json.loads((tmp_path / name / "demo.json").read_text())["stages"] == result["stages"]
        results.append({k: v for k, v in result.items() if k != "seconds"})
    assert results[0] == results[1]
    assert set(results[0]["stages"]) == {"start", "outcome", "sspo"}
    chain = results[0]["chains"]["start"][0]["steps"]
    assert chain[-1]["text"].startswith("####") and chain[-1]["value"] == 0.0 and chain[-1]["needed"]
    assert not all(step["needed"] for step in chain)  # the start model is wordy
    text = capsys.readouterr().out
    assert "| right answers, greedy |" in text and "outcome only (RLOO)" in text
    assert results[0]["sentence"] in text and "over its 8 held-out problems" in results[0]["sentence"]


def chain(right: bool, *steps: tuple[str, bool]) -> dict:
    return {"right": right, "steps": [{"text": text, "needed": needed, "advantage": -0.07} for text, needed in steps]}


def test_needed_and_idle_steps_have_their_colours():
    """Whatever their advantages. Mutations: the colours exchanged, the advantage's sign for `needed` -> red."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_hex
    from matplotlib.patches import Rectangle
    from matplotlib.text import Text

    from sspo_ext.demo.picture import IDLE, NEEDED, draw_solutions

    wordy = chain(True, ("hmm", False), ("1 + 1 = 2", True), ("check 1 + 1 = 2", False), ("#### 2", True))
    short = chain(False, ("1 + 1 = 3", True), ("#### 3", True))
    figure = plt.figure()
    draw_solutions(figure, {"start": [wordy], "outcome": [wordy], "sspo": [short]}, ["1 + 1 = ? \n"])
    figure.canvas.draw()
    axes = figure.axes
    colours = [
        [to_hex(p.get_facecolor()) for p in axis.findobj(Rectangle) if p is not axis.patch and p.get_height() < 1]
        for axis in axes
    ]
    titles = [axis.get_title(loc="left") for axis in axes]
    texts = [text.get_text() for text in figure.findobj(Text)]
    plt.close(figure)
    assert colours == [[IDLE, NEEDED, IDLE, NEEDED]] * 2 + [[NEEDED, NEEDED]]
    assert titles[0].endswith("4 steps, 2 idle") and titles[2].endswith("2 steps, 0 idle")
    assert texts.count("\u2713") == 2 and texts.count("\u2717") == 1
    assert any(text.startswith("One problem, 1 + 1:") for text in texts)


def test_the_problem_drawn_is_the_median_of_those_that_all_solve():
    from sspo_ext.demo.picture import typical

    step = ("1 + 1 = 2", True)
    lengths = (2, 3, 5, 4, 8)  # of outcome only; SSPO takes 2
    chains = {
        "start": [chain(i != 0, step) for i in range(5)],
        "outcome": [chain(True, *[step] * n) for n in lengths],
        "sspo": [chain(True, step, step)] * 5,
    }
    assert typical(chains) == 2  # of 3, 5, 4, 8; the first is not solved by all
    assert typical({name: [chain(False, step)] * 3 for name in chains}) == 1


def test_a_long_solution_keeps_its_end():
    from sspo_ext.demo.picture import shortened

    long = [{"text": str(k), "needed": True} for k in range(9)]
    assert [step["text"] for step in shortened(long, 5)] == ["0", "1", "2", "...", "8"]
    assert shortened(long, 9) == long


def test_applied_lines():
    lines = ["hmm", "7 + 5 = 12", "check 7 + 5 = 12", "7 + 5 = 12", "12 + 5 = 17", "so far 17", "#### 17"]
    assert Task("sums").applied(lines) == [None, "5", None, None, "5", None, None]


def test_claim_of_problems():
    """By hand: 2 of 4 tokens saved on average, one answer more of four."""
    ours = {"correct": [1, 1, 0, 1], "tokens": [2, 2, 2, 2]}
    theirs = {"correct": [1, 0, 0, 1], "tokens": [4, 4, 5, 3]}
    claim = of_problems(ours, theirs)
    # of tokens: 2 - theirs / 2 = 0, 0, -.5, .5, whose variance is .5 / 3
    assert claim.shorter == pytest.approx((0.5, 1.96 * (0.5 / 3 / 4) ** 0.5 / 4))
    # of answers: 0, 1, 0, 0, whose variance is .75 / 3
    assert claim.right == pytest.approx((0.25, 1.96 * (0.75 / 3 / 4) ** 0.5))
    assert standard_error([1.0]) == 0.0


@pytest.mark.parametrize(
    "shorter,right,words",
    [
        (
            (0.40, 0.05),
            (0.03, 0.02),
            "at least a third shorter than those of outcome-only training and more often right",
        ),
        ((0.40, 0.05), (0.01, 0.02), "at least a third shorter than those of outcome-only training and as often right"),
        ((0.40, 0.08), (0.0, 0.02), "are shorter than those of outcome-only training and as often right"),
        ((0.40, 0.05), (0.0, 0.03), "but not shown to be as often right"),
        ((0.40, 0.05), (-0.01, 0.03), "but not shown to be as often right"),
        ((0.40, 0.05), (-0.05, 0.04), "but less often right"),
        ((0.02, 0.05), (0.0, 0.01), "are not shown to be shorter than"),
    ],
)
def test_the_sentence_follows_the_intervals(shorter, right, words):
    sentence = Claim(shorter, right).sentence("this run")
    assert words in sentence and sentence.startswith("SSPO's solutions of this run are ")
    assert f"{100 * shorter[0]:.1f} ± {100 * shorter[1]:.1f} % fewer tokens" in sentence
    assert f"{100 * right[0]:+.1f} ± {100 * right[1]:.1f} points" in sentence


@pytest.mark.slow
def test_demo_compresses(tmp_path):
    result = run(tmp_path)
    start, outcome, sspo = (result["stages"][name] for name in ("start", "outcome", "sspo"))
    assert sspo["greedy"]["accuracy"] >= start["greedy"]["accuracy"] - 0.01
    assert sspo["sampled"]["accuracy"] > start["sampled"]["accuracy"] + 0.2
    assert sspo["greedy"]["tokens"] < 0.65 * start["greedy"]["tokens"]
    assert sspo["greedy"]["tokens"] < 0.85 * outcome["greedy"]["tokens"]
    saved, error = result["claim"]["shorter"]
    assert saved - error > 0.2 and "less often right" not in result["sentence"]
