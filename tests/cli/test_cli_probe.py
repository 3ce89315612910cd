# SPDX-License-Identifier: Apache-2.0
"""`sspo-ext probe` on the package's start model, and what it says before it loads a model.

Mutations, each caught: completions that do not depend on --seed; the graders' rewards swapped with others
(test_table_numbers_and_curve); options checked after the model is loaded (test_mistakes_come_first).
"""

import json

import pytest

pytest.importorskip("transformers")

from sspo_ext.cli.main import main
from sspo_ext.demo.arms import START
from sspo_ext.demo.tasks import Task


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "sums.jsonl"
    rows = [{"prompt": p.prompt, "answer": p.answer} for p in Task("sums").problems(6, 3, held_out=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(data, tmp_path, *more):
    output = tmp_path / "found.json"
    given = ["--model", str(START), "--data", str(data), "--grader", "exact:####", "--max-completion-length", "100"]
    given += ["--num-generations", "3", "--no-builtin", "--text", "####", "--text", "zh", "--device", "cpu"]
    assert main(["probe", *given, "--output", str(output), *more]) == 0
    return json.loads(output.read_text(encoding="utf-8"))


def test_table_numbers_and_curve(data, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "budget.png"
    found = run(data, tmp_path, "--budget", "tokens", "--budgets", "0", "20", "100", "--plot", str(picture))
    printed = capsys.readouterr().out
    assert found["best"] == "####" and [t["name"] for t in found["trials"]] == ["####", "zh"]
    assert found["completions"] == 18 and 0 < found["right"] < 18 and found["options"]["seed"] == 0
    first = found["trials"][0]
    assert f"| #### | #### | {first['before']:.3f} | {first['after']:.3f} |" in printed and found["reason"] in printed
    assert first["after"] > 0.7 > 0.4 > first["before"] and first["auc"] > 0.8
    budget = found["budget"]
    assert budget["budgets"] == [0, 20, 100] and budget["probe"] == "####" and budget["by"] == "tokens"
    # nothing goes on to 100 tokens, so there every completion that ended counts by its reward
    assert budget["accuracy"][2] >= found["right"] / 18 and picture.stat().st_size > 10_000
    assert f"The area under this curve is {budget['area']:.3f}" in printed
    assert run(data, tmp_path)["trials"] == found["trials"]
    assert run(data, tmp_path, "--seed", "1")["trials"] != found["trials"]
    compact = run(data, tmp_path, "--rollout-engine", "compact")
    assert compact["right"] == found["right"]


def test_greedily_one_completion_of_each_prompt(data, tmp_path):
    found = run(data, tmp_path, "--temperature", "0", "--prompts", "4")
    assert found["completions"] == 4


@pytest.mark.parametrize(
    "more, message",
    (
        (["--text", "jp"], "probe: expected a language"),
        (["--no-builtin"], "probes: expected at least one"),
        (["--split-by", "numbered"], "--split-by: 'numbered'"),
        (["--output", "none/such/x.json"], "--output: no folder"),
        (["--budget", "steps", "--plot", "none/such/x.png"], "--plot: no folder"),
        (["--plot", "x.png"], "--plot: has no effect without --budget"),
        (["--budgets", "1"], "--budgets: has no effect without --budget"),
        (["--grader", "none"], "grader: expected"),
    ),
)
def test_mistakes_come_first(data, tmp_path, capsys, more, message):
    assert main(["probe", "--model", "none/such", "--data", str(data), *more]) == 2
    assert message in capsys.readouterr().err


def test_rows_and_turns(data, tmp_path, capsys):
    assert main(["probe", "--model", str(START), "--data", str(data), "--probe-turn"]) == 2
    assert "--probe-turn: the tokenizer has no chat template" in capsys.readouterr().err
    data.write_text('{"prompt": "1 + 1 = ? \\n"}\n')
    assert main(["probe", "--model", str(START), "--data", str(data)]) == 2
    assert "has no 'answer'" in capsys.readouterr().err
