# SPDX-License-Identifier: Apache-2.0
"""Rows of files: their forms, and messages that name all bad rows.

Mutation, caught by the test named:
  stop at the first bad row                                       test_all_bad_rows_are_named
"""

import json
import logging

import pytest
from helpers.paths import ROOT

from benchmarks.models.gsm8k import load_gsm8k_solutions
from sspo_ext.data.rows import load_preference_rows

USER = [{"role": "user", "content": "p"}]


def write(path, lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), "utf-8")
    return path


def test_forms_of_a_row(tmp_path):
    file = write(
        tmp_path / "a.jsonl",
        [
            "\ufeff" + json.dumps({"prompt": "p", "chosen": "a\u2028b", "rejected": "c", "weight": 2, "other": [1]}),
            "",
            {"prompt": "p", "chosen": ["a", "b\n", "c"], "rejected": ["a", "d"], "branch": 1, "margin": 0.5},
            {"prompt": "p", "initial_reason_steps": "Step 1: a\nStep 2:", "chosen": " b", "rejected": " c"},
            {"prompt": USER, "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"},
            {
                "chosen": [*USER, {"role": "assistant", "content": "a"}],
                "rejected": [*USER, {"role": "assistant", "content": "b"}],
            },
        ],
    )  # fmt: skip
    rows = load_preference_rows(file)
    assert rows == load_preference_rows([str(file)])
    assert [r["source"].rsplit(":", 1)[1] for r in rows] == ["1", "3", "4", "5", "6"]
    before = "Step 1: a\nStep 2:"
    common = {"prompt": "p", "branch": None, "partial": False, "weight": 1.0, "margin": 0.0}
    chat = {**common, "prompt": USER, "chosen": "a", "rejected": "b"}
    assert [{k: v for k, v in r.items() if k != "source"} for r in rows] == [
        {**common, "chosen": "a\u2028b", "rejected": "c", "weight": 2.0},
        {**common, "chosen": ["a\n", "b\n", "c"], "rejected": ["a\n", "d"], "branch": 1, "margin": 0.5},
        {**common, "chosen": [before, " b"], "rejected": [before, " c"], "branch": 1, "partial": True},
        chat,
        chat,
    ]  # fmt: skip
    assert load_preference_rows([{"prompt": "p", "chosen": ["a", "b"], "rejected": "c"}], step_separator=" ")[0][
        "chosen"
    ] == ["a ", "b"]


def test_all_bad_rows_are_named(tmp_path):
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    bad = {
        "{": "not a line of JSON",
        "[1]": "expected a JSON object, got list",
        json.dumps({"prompt": "p", "chosen": "a"}): "got no rejected",
        json.dumps({"completion": 1}): "got no prompt and no chosen and no rejected",
        json.dumps({**good, "rejected": " "}): "rejected: expected a text, got an empty one",
        json.dumps({**good, "prompt": 3}): "prompt: expected a text, got int",
        json.dumps({**good, "chosen": ["a", ""]}): "chosen: step 1: expected a text, got an empty one",
        json.dumps({**good, "chosen": []}): "chosen: expected at least one step",
        json.dumps({**good, "rejected": "a"}): "the same text",
        json.dumps({**good, "chosen": ["a"], "branch": 1}): "branch: expected less than the 1 steps of chosen, got 1",
        json.dumps({**good, "branch": -1}): "branch: expected the number of shared steps, got -1",
        json.dumps({**good, "chosen": ["x", "b"], "rejected": ["y", "b"], "branch": 1}): "branch: the first 1 steps",
        json.dumps({**good, "weight": "1"}): "weight: expected a finite number, got '1'",
        json.dumps({**good, "weight": -1}): "weight: expected at least 0",
        json.dumps({**good, "margin": float("nan")}): "margin: expected a finite number",
        json.dumps({**good, "partial": 1}): "partial: expected true or false",
        json.dumps({**good, "chosen": [{"role": "assistant", "content": "a"}]}): "needs a prompt that is one too",
        json.dumps({"prompt": "p", "completions": ["a", "b"], "labels": [True]}): "labels: expected one for each of 2",
        json.dumps({"prompt": "p", "completions": ["a"], "labels": ["yes"]}): "labels: expected a list of true and",
    }  # fmt: skip
    file = write(tmp_path / "bad.jsonl", [good, *bad])
    with open(file, "ab") as f:
        f.write(b'{"prompt": "\xff"}\n')
    with pytest.raises(ValueError) as error:
        load_preference_rows(file)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{len(bad) + 1} of {len(bad) + 2} rows cannot be used:"
    for number, (line, reason) in enumerate(zip(lines[1:], bad.values(), strict=False), 2):
        assert line.startswith(f"  {file}:{number}: ") and reason in line, line
    assert lines[-1].startswith(f"  {file}:{len(bad) + 2}: not a line of JSON")
    with pytest.raises(ValueError, match="50 of 50 rows cannot be used:(.*\n){21}.*and 30 more"):
        load_preference_rows([{}] * 50)
    with pytest.raises(ValueError, match="found none"):
        load_preference_rows([])
    with pytest.raises(TypeError, match="^source: .*int"):
        load_preference_rows([3])
    with pytest.raises(FileNotFoundError):
        load_preference_rows(tmp_path / "none.jsonl")


def test_stepwise_supervision(caplog):
    rows = [
        {"prompt": "p", "completions": ["a", "b", "c"], "labels": [True, True, True]},
        {"prompt": "p", "completions": ["a", "x", "y"], "labels": [True, False, False]},
        {"prompt": "p", "completions": ["a", "z"], "labels": [True, False]},
        {"prompt": "p", "completions": ["a", "b", "d"], "labels": [1, 1, 0]},
        {"prompt": "other", "completions": ["a", "x"], "labels": [True, False]},
    ]
    with caplog.at_level(logging.WARNING):
        pairs = load_preference_rows(rows)
    assert "1 of 5 stepwise rows give no pair" in caplog.text and "row 4" in caplog.text
    assert [(p["chosen"], p["rejected"], p["branch"], p["source"]) for p in pairs] == [
        (["a\n", "b"], ["a\n", "x"], 1, "row 0 and row 1"),
        (["a\n", "b"], ["a\n", "z"], 1, "row 0 and row 2"),
        (["a\n", "b\n", "c"], ["a\n", "b\n", "d"], 2, "row 0 and row 3"),
    ]
    assert all(p["partial"] and p["prompt"] == "p" for p in pairs)
    with pytest.raises(ValueError, match="row 1: labels: step 0 is labelled true after the same steps in row 0"):
        load_preference_rows(
            [{"prompt": "p", "completions": ["a"], "labels": [label]} for label in (True, False)]
        )  # fmt: skip


def test_gsm8k_solutions(tmp_path):
    def line(i, **solutions):
        return {"question": f"q{i}", "ground_truth": "A: 1", **solutions}

    good, wrong = {"solution": "1 + 1 = 2\nA: 2", "is_correct": True}, {"solution": "A: 3", "is_correct": False}
    other = {"solution": "A: 4", "is_correct": False}
    file = write(
        tmp_path / "s.jsonl", [line(i, m=wrong, n=good, o=good, p=other) for i in range(200)] + [line(-1, m=good)]
    )
    train, held = load_gsm8k_solutions(file, held_out=0.25)
    assert len(train) + len(held) == 200 and 30 < len(held) < 70
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in held}
    assert {(r["chosen"], r["rejected"]) for r in train + held} == {("1 + 1 = 2\nA: 2", "A: 3")}
    assert train[0]["prompt"].startswith("Question: q") and train[0]["prompt"].endswith("\nAnswer:\n")
    again, _ = load_gsm8k_solutions(write(tmp_path / "t.jsonl", [line(7, m=wrong, n=good)]), held_out=0.25)
    assert bool(again) == any(r["prompt"] == "Question: q7\nAnswer:\n" for r in train)
    assert len(load_gsm8k_solutions(file, held_out=0, max_pairs=9)[0]) == 400
    assert load_gsm8k_solutions(file, held_out=0, prompt_template="{question}? ")[0][0]["prompt"] == "q0? "
    assert load_gsm8k_solutions(file, held_out=0, models=["p", "n"])[0][0]["rejected"] == "A: 4"
    with pytest.raises(ValueError, match=r"^models: expected some of .*, got \[.x.\]"):
        load_gsm8k_solutions(file, models=["n", "x"])
    write(file, [line(1, m={"solution": "a", "is_correct": 1}), line(2, m=good), {"question": "q"}])
    with pytest.raises(
        ValueError, match="2 of 3 rows(.*\n)*.*:1: m: expected is_correct(.*\n)*.*:3: expected at least"
    ):
        load_gsm8k_solutions(file)


def test_gsm8k_solutions_real_file():
    path = ROOT.parent / "shared/data/gsm8k/example_model_solutions.jsonl"
    if not path.exists():
        pytest.skip("example_model_solutions.jsonl of openai/grade-school-math is not on this machine")
    train, held = load_gsm8k_solutions(path)
    assert len(train) + len(held) == 731
    assert 0.15 < len(held) / 731 < 0.25
