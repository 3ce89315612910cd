"""The demo's task by hand-made examples, and the whole demo at toy size. Its measured improvement is the slow test."""

import json
import random

import pytest

pytest.importorskip("reasoning_gym")
pytest.importorskip("matplotlib")

from sspo_ext.demo import DemoConfig, run
from sspo_ext.demo.task import (
    Problem,
    branch_row,
    demonstration,
    make_tokenizer,
    problems,
    review,
    slip,
    text_of,
)

SUM = Problem("7 + 5 - 9 + 8")
RIGHT = "7 + 5 = 12\n12 - 9 = 3\n3 + 8 = 11\nanswer 11"


def test_problem():
    assert SUM.prompt == "7 + 5 - 9 + 8 =\n" and SUM.answer == 11
    assert SUM.terms == [("", 7), ("+", 5), ("-", 9), ("+", 8)]


@pytest.mark.parametrize(
    "op,a,b,expected",
    [
        ("+", 7, 5, 2),
        ("+", 17, 5, 12),
        ("+", 4, 5, None),
        ("-", 3, 8, 5),
        ("-", 8, 3, None),
        ("+", -4, 9, None),
        ("-", -4, 2, None),
    ],
)
def test_slip(op, a, b, expected):
    assert slip(op, a, b) == expected


@pytest.mark.parametrize(
    "text,correct,bad,kind,better",
    [
        (RIGHT, True, None, None, None),
        ("7 + 5 = 2\n2 - 9 = -7\n-7 + 8 = 1\nanswer 1", False, 0, "slip", "7 + 5 = 12"),
        ("7 + 5 = 12\ncheck 7 + 5 = 12\n12 - 9 = 3\n3 + 8 = 11\nanswer 11", True, 1, "redundant", "12 - 9 = 3"),
        ("7 + 5 = 12\nso far 12\n12 - 9 = 3\n3 + 8 = 11\nanswer 11", True, 1, "redundant", "12 - 9 = 3"),
        ("7 + 5 = 12\nso far 2\nanswer 2", False, 1, "slip", "12 - 9 = 3"),
        ("7 + 5 = 12\n12 - 9 = 3\nanswer 3", False, 2, "slip", "3 + 8 = 11"),
        ("7 + 5 = 12\n12 - 9 = 3\n3 + 8 = 11\nanswer 1", False, 3, "slip", "answer 11"),
        (RIGHT + "\nanswer 11", True, 4, "slip", None),
        ("7 + 5 = 12", False, 1, "slip", None),
        ("", False, 0, "slip", "7 + 5 = 12"),
    ],
)
def test_review(text, correct, bad, kind, better):
    found = review(SUM, text)
    assert (found.correct, found.bad, found.kind, found.better) == (correct, bad, kind, better)


def test_rows():
    found = review(SUM, "7 + 5 = 12\n12 - 9 = 3\n3 + 8 = 1\nanswer 1")
    row = branch_row(SUM, found)
    assert row["chosen"] == ["7 + 5 = 12\n", "12 - 9 = 3\n", "3 + 8 = 11\n"]
    assert row["rejected"] == ["7 + 5 = 12\n", "12 - 9 = 3\n", "3 + 8 = 1\n"] and row["branch"] == 2
    assert branch_row(SUM, review(SUM, RIGHT)) is None


def test_teacher_and_tokenizer():
    tokenizer, rng = make_tokenizer(), random.Random(0)
    seen = {review(p, demonstration(p, rng)).kind for p in problems(50, seed=3)}
    assert seen >= {"slip", "redundant"}
    assert demonstration(SUM, rng, slips=0, repeats=0) == RIGHT
    for p in problems(50, seed=4):
        text = demonstration(p, rng)
        ids = tokenizer(p.prompt + text + tokenizer.eos_token).input_ids
        assert tokenizer.pad_token_id not in ids  # which is also the unknown token
        assert text_of(tokenizer, ids[len(tokenizer(p.prompt).input_ids) :]) == text


def test_problems_are_distinct():
    held_out = problems(100, seed=1)
    train = problems(500, seed=2, exclude=frozenset(p.expression for p in held_out))
    assert len({p.expression for p in held_out + train}) == 600


TOY = DemoConfig(held_out=8, imitation_steps=8, problems_per_round=8, rounds=1, hidden_size=16)


def test_toy_run_is_whole_and_repeatable(tmp_path, capsys):
    results = []
    for name in ("a", "b"):
        result = run(tmp_path / name, TOY)
        assert (tmp_path / name / "demo.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / name / "model" / "model.safetensors").exists()
        assert json.loads((tmp_path / name / "demo.json").read_text())["stages"] == result["stages"]
        results.append({k: v for k, v in result.items() if k != "seconds"})
    assert results[0] == results[1]
    assert "| right answer, greedy |" in capsys.readouterr().out


@pytest.mark.slow
def test_demo_improves(tmp_path):
    before, *_, after = run(tmp_path)["stages"]
    assert after["accuracy"] > before["accuracy"] + 0.3
    assert after["tokens"] < 0.7 * before["tokens"]
    assert after["slip_pairs"]["preference_accuracy"] > 0.9
