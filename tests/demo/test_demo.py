# SPDX-License-Identifier: Apache-2.0
"""The generated tasks by hand-made examples, and the whole demo at toy size. Its measured effect is the slow test."""

import json
import random

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from sspo_ext.demo import DemoConfig, run
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
    assert chain[-1]["text"].startswith("####") and chain[-1]["value"] == 0.0
    text = capsys.readouterr().out
    assert "| right answers, greedy |" in text and "outcome only (RLOO)" in text


def test_no_advantage_reads_as_minus_zero():
    import matplotlib.pyplot as plt
    from matplotlib.text import Text

    from sspo_ext.demo.picture import draw_chains

    chain = [{"right": True, "steps": [{"text": f"s{a}", "advantage": a} for a in (-0.004, 0.004, -0.0, -0.25, 0.9)]}]
    figure = plt.figure()
    draw_chains(figure, {"start": chain, "sspo": chain}, ["1 + 1 = ?"])
    figure.canvas.draw()
    texts = [text.get_text() for text in figure.findobj(Text)]
    plt.close(figure)
    assert texts.count("advantage 0.00") == 6 and "advantage \u22120.25" in texts and "0" in texts
    assert not [text for text in texts if text[-5:] in ("-0.00", "+0.00", "\u22120.00") or text in ("+0", "-0")]


@pytest.mark.slow
def test_demo_compresses(tmp_path):
    stages = run(tmp_path)["stages"]
    start, sspo = stages["start"], stages["sspo"]
    assert sspo["greedy"]["accuracy"] >= start["greedy"]["accuracy"] - 0.01
    assert sspo["sampled"]["accuracy"] > start["sampled"]["accuracy"] + 0.2
    assert sspo["greedy"]["tokens"] < 0.65 * start["greedy"]["tokens"]
    assert sspo["greedy"]["tokens"] < 0.85 * stages["outcome"]["greedy"]["tokens"]
