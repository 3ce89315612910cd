# SPDX-License-Identifier: Apache-2.0
"""The compression benchmark's controls, arithmetic and report; one pair-form update.

Mutations that turned a test red: 1.96 for Student's quantile, n for n - 1 (test_interval); the first language's runs
alone (test_over_seeds); a mean of means (test_ties_are_rounded_alike); most arms below the axis (test_lowest_shown); an
error and a cell of docs/rl.md changed (test_the_page_*); the reporting machine instead of the runs' (test_report);
a colour one level off (test_picture_drawn_again); finished files not collected, before and after the runs, recorded
runs run again (test_the_same_command_goes_on).
"""

import json
import math
import re

import pytest
from helpers.paths import ROOT

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")


from helpers.pictures import assert_same_picture

from benchmarks import records
from benchmarks.compression import __main__ as command
from benchmarks.compression.__main__ import parse
from benchmarks.compression.arms import ARMS, DECISIVE, ShuffledValues, ZeroValues
from benchmarks.compression.pairs import PairArm, _forward, train_pairs
from benchmarks.compression.pictures import draw, lowest_shown
from benchmarks.compression.report import _accuracy, best_penalty, commands, read_runs, report, write_report
from benchmarks.compression.verdicts import (
    accuracy,
    difference,
    interval,
    over_seeds,
    pair_verdicts,
    student,
    total,
    verdicts,
)
from sspo_ext.demo.arms import load_start, make_trainer
from sspo_ext.demo.tasks import Task
from sspo_ext.train.sspo_trainer import SSPOTrainer


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    model, tokenizer = load_start()
    made = [
        make_trainer(model, tokenizer, Task("sums"), tmp_path_factory.mktemp("t"), updates=1, seed=0, prompts=2,
                     num_generations=2, trainer_class=kind)
        for kind in (SSPOTrainer, ShuffledValues, ZeroValues)
    ]  # fmt: skip
    return made


def test_controls_keep_what_they_must(trainers):
    whole, shuffled, zero = trainers
    rollouts = whole.roll_out(whole.train_dataset, [(0, i) for i in range(len(whole.train_dataset))])
    real, mixed, none = (t.step_values(rollouts) for t in trainers)
    assert [len(v) for v in mixed] == [len(v) for v in real] == [len(r.steps) + 1 for r in rollouts]
    assert sorted(x for v in mixed for x in v) == sorted(x for v in real for x in v) and mixed != real
    assert all(v[-1] == 0 for v in mixed) and not any(x for v in none for x in v)
    assert all(0 <= x <= 1 for v in real for x in v)


def test_length_penalty():
    task, text = Task("sums"), "6 + 2 = 8 \n #### 8"
    tokens = len(task.tokenizer()(text + " <eos>").input_ids)
    assert ARMS["penalty-0.5"].reward(task)("", text, "8") == pytest.approx(1 - 0.5 * tokens / 50)
    assert ARMS["penalty-1"].reward(task)("", "so " * 90 + text, "8") == 0.0
    assert ARMS["penalty-0.5"].reward(task)("", text, "9") == 0.0
    assert ARMS["sspo-0"].reward(task)("", "so " * 90 + text, "8") == 1.0  # no length in SSPO's reward
    assert set(DECISIVE) <= set(ARMS)


def test_report(tmp_path):
    pytest.importorskip("matplotlib")
    runs = []
    for arm, bits in (("penalty-0.25", [1, 1, 0, 0]), ("penalty-0.5", [1, 1, 1, 0]), ("sspo-0", [1, 1, 1, 1])):
        for seed in (0, 1):
            correct = bits if seed else [1, 1, 0, 0]
            numbers = {"correct": correct, "tokens": [5, 6, 7, 8], "steps": [2] * 4, "skipped": [0] * 4}
            runs.append({"family": "sums", "language": "en", "arm": arm, "seed": seed, "machine": f"a machine, {arm}",
                         "updates": 3, "held_out": 4, "seconds": 1.0, "sampled_tokens": 1000, "greedy": numbers,
                         "sampled": numbers})  # fmt: skip
    records.write(tmp_path / "runs.parquet", runs)
    text = write_report(tmp_path)
    assert "length penalty 0.5 (the best of those run)" in text and "0.25 (the best" not in text
    assert "| SSPO, lambda 0 | 2 | 0.750 ± 0.283 [0.500, 1.000] | 6.5 |" in text
    assert (tmp_path / "sums-en.png").exists() and (tmp_path / "RESULTS.md").read_text() == text
    assert "`python -m benchmarks compression --families sums --languages en --seeds 2 --arms penalty-0.25 " in text
    assert "a machine, penalty-0.25; a machine, penalty-0.5; a machine, sspo-0. Training took" in text
    assert best_penalty({}) is None
    assert "Training took 0.0 hours summed over the 6 runs, so about 0.0 two side by side" in text
    assert _accuracy(runs_of("rloo", 5, [1, 1, 1]), "greedy") == "1.000 ± 0.000"


def test_commands_make_the_runs_and_no_others():
    there = {("sums", "en"): (3, 3, 1), ("sort", "en"): (3, 2, 0), ("sums", "zh"): (3, 3, 0), ("sort", "zh"): (3, 3, 0)}
    tasks = {
        task: {
            "start": [{}],
            **{arm: [{}] * n for arm, n in zip(("rloo", "sspo-9", "pairs"), counts, strict=True) if n},
        }
        for task, counts in there.items()
    }
    expected = {
        (family, language, arm, seed)
        for (family, language), arms in tasks.items()
        for arm, runs in arms.items()
        for seed in range(len(runs))
    }
    found = [vars(parse(command.split()[4:])) for command in commands(tasks)]
    named = [
        (family, language, arm, seed)
        for o in found
        for family in o["families"]
        for language in o["languages"]
        for arm in o["arms"]
        for seed in range(o["seeds"] if ARMS[arm].trains else 1)
    ]
    assert set(named) == expected and len(named) == len(expected)
    assert any("--families sort sums --languages en zh --seeds 3 --arms start rloo" in c for c in commands(tasks))


def runs_of(arm: str, tokens: int, *seeds: list[int]) -> list[dict]:
    numbers = [{"correct": bits, "tokens": [tokens] * len(bits), "skipped": [0] * len(bits)} for bits in seeds]
    return [{"arm": arm, "seed": seed, "greedy": n, "sampled": n} for seed, n in enumerate(numbers)]


def test_verdicts():
    """Differences are taken problem by problem: these two arms are right on the same share of other problems."""
    ours, others = runs_of("sspo-0", 10, [1, 1, 0, 0], [1, 1, 0, 1]), runs_of("rloo", 20, [1, 0, 0, 0], [1, 0, 1, 0])
    mean, error, single = difference(ours, others, "greedy", "correct")
    # by problem: 1 - 1, 1 - 0, 0 - 1/2, 1/2 - 0
    assert mean == pytest.approx(0.25) and single == [0.25, 0.25]
    assert error == pytest.approx(1.96 * (1.25 / 3 / 4) ** 0.5)
    arms = {"sspo-0": ours, "rloo": others, "start": runs_of("start", 20, [0, 0, 0, 0])}
    text = verdicts({("sums", "en"): arms})
    assert "| sums, en | lambda 0 | **-50%** | **-50%** | +0.250 ± 0.633 [+0.250, +0.250] |" in text
    assert text.splitlines()[2].endswith("| 0 | - | - | - | - |")  # nothing skipped, and nothing to compare with
    ours[0]["greedy"]["skipped"] = [2, 0, 1, 0]
    assert "| 0.250 (50%) | - | - | - | - |" in verdicts({("sums", "en"): arms})
    ours[0]["greedy"]["skipped"] = [0, 0, 0, 0]
    arms["sspo-0-shuffled"] = runs_of("sspo-0-shuffled", 20, [0, 0, 0, 0])
    arms["rloo"] = runs_of("rloo", 20, [1, 1, 1, 1])
    found = verdicts({("sums", "en"): arms}).splitlines()[2]
    assert "| -0.375 ± 0.469 [-0.500, -0.250] |" in found
    arms["rloo"] = runs_of("rloo", 20, [1, 1, 1, 1], [1, 1, 1, 1])
    arms["sspo-0"] = runs_of("sspo-0", 19, [0, 0, 0, 0])
    found = verdicts({("sums", "en"): arms}).splitlines()[2]
    assert "| -5% | -5% | *-1.000 ± 0.000 [-1.000, -1.000]*" in found


def test_pair_verdicts():
    arms = {"pairs": runs_of("pairs", 10, [1, 1, 1, 1]), "whole-pairs": runs_of("whole-pairs", 10, [0, 0, 0, 0])}
    arms["pairs"][0]["greedy"]["skipped"] = [1, 1, 1, 1]
    rows = pair_verdicts({("sums", "en"): arms}).splitlines()[2:]
    better, worse = (f"{mark}+1.000 ± 0.000 [+1.000, +1.000]{mark}" for mark in ("**", "*"))
    less = "DPO on whole solutions + likelihood"
    assert rows == [
        f"| sums, en | {less} | {better} | {better} | {worse} | {worse} |",
        f"| sums, en: over seeds | {less} |{' +1.000 |' * 4}",
    ]
    assert pair_verdicts({("sums", "en"): {"sspo-0": arms["pairs"]}}) == ""


def test_interval():
    assert interval([1.0]) == (1.0, math.inf)
    mean, half = interval([0.1, 0.2, 0.6])
    assert mean == pytest.approx(0.3) and half == pytest.approx(4.3027 * (0.14 / 2 / 3) ** 0.5)
    # quantiles as printed in tables
    for freedom, quantile in ((1, 12.706), (2, 4.303), (5, 2.571), (7, 2.365), (10, 2.228), (30, 2.042), (1000, 1.962)):
        assert student(freedom) == pytest.approx(quantile, abs=2e-3)


def test_over_seeds():
    """A seed is one number, however many problems; where two languages are named, all runs are taken together."""
    ours = runs_of("sspo-0", 10, [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1])
    others = runs_of("rloo", 20, [1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0])
    zh = runs_of("rloo", 20, [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0])
    en, both = {"sspo-0": ours, "rloo": others}, {"sspo-0": ours, "rloo": zh}
    rows = over_seeds({("sums", "zh"): both, ("sums", "en"): en}).splitlines()[2:5]
    # .25, .5, 1 and .25, .75, 1: variances 7 / 48 and 19 / 160
    assert rows[0].startswith("| sums, en | lambda 0 | 3 | +0.583 ± 0.949 | +0.583 ± 0.949 | - |")
    assert rows[1].startswith("| sums, zh | lambda 0 | 3 | +0.667 ± 0.949 |")
    assert rows[2].startswith("| sums, en and zh | lambda 0 | 6 | **+0.625 ± 0.362** |")
    assert "lambda 0.9" not in over_seeds({("sums", "en"): en})


def test_ties_are_rounded_alike():
    """1071 of 1200 is .8925, whichever way it was added up."""
    bits = ([1] * 374 + [0] * 26, [1] * 341 + [0] * 59, [1] * 356 + [0] * 44)
    for seeds in (bits, bits[::-1]):
        runs = runs_of("rloo", 5, *seeds)
        assert total(runs, "greedy", "correct") == accuracy(runs, "greedy")[0] == 1071 / 1200


def test_lowest_shown():
    assert lowest_shown([0.22, 0.9, 0.92, 0.95]) == 0.9
    assert lowest_shown([0.85, 0.9, 0.92, 0.95]) == 0.85  # no gap above 0.1
    assert lowest_shown([0.2, 0.22, 0.25, 0.95]) == 0.2  # most of them lie below
    assert lowest_shown([0.5]) == 0.5


RESULTS = ROOT / "benchmarks/results/compression"
PAGE_ARMS = ("start", "rloo", "sspo-0", "sspo-0-shuffled", "sspo-0-zero", "sspo-9", "sspo-9-shuffled", "sspo-9-zero",
             "penalty-0.25", "penalty-1")  # fmt: skip


@pytest.fixture(scope="module")
def stored():
    return read_runs(RESULTS)


def test_the_page_has_the_runs_numbers(stored):
    """docs/rl.md's table, cell by cell."""
    page = (ROOT / "docs/rl.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:start model|outcome only \(RLOO\)|SSPO, |\.\.\. values|RLOO, length).*$", page, re.M)
    assert len(rows) == len(PAGE_ARMS)
    columns = [(family, language) for family in ("sums", "letters", "sort") for language in ("en", "zh")]
    for arm, row in zip(PAGE_ARMS, rows, strict=True):
        cells = []
        for task in columns:
            runs = stored[task][arm]
            greedy, sampled = (f"{total(runs, how, 'correct'):.3f}".lstrip("0") for how in ("greedy", "sampled"))
            cells.append(f"{greedy} @ {total(runs, 'greedy', 'tokens'):.0f} ({sampled})")
        assert row.split(" | ", 1)[1].removesuffix(" |").split(" | ") == cells, arm


def test_the_page_quotes_the_report():
    """Every difference with its error in docs/rl.md stands in RESULTS.md, which is what the runs give."""
    page = (ROOT / "docs/rl.md").read_text(encoding="utf-8")
    results = (RESULTS / "RESULTS.md").read_text(encoding="utf-8")
    quoted = re.findall(r"(\.\d{3}) ± (\.\d{3})", page)
    assert len(quoted) > 15
    assert not [pair for pair in quoted if "0{} ± 0{}".format(*pair) not in results]


def test_report_made_again(stored):
    assert report(stored) == (RESULTS / "RESULTS.md").read_text(encoding="utf-8")
    assert sum(len(runs) for arms in stored.values() for runs in arms.values()) == 213


@pytest.mark.parametrize("task", ("sums-en", "sort-zh"))
def test_picture_drawn_again(stored, task, tmp_path):
    family, language = task.split("-")
    draw(stored[family, language], tmp_path / "new.png", f"{family}, {language}")
    assert_same_picture(tmp_path / "new.png", RESULTS / f"{task}.png")


def test_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    """What is in the table or finished beside it is not run again; a run whose file is torn is."""
    asked = []

    def execute(runs, options, title, length):
        asked.append((title, [run.name for run in runs]))
        for run in runs:
            if run.arm != "make-start":
                finish(run.arm, 2)

    def finish(arm, number):
        run = {"family": "sort", "language": "en", "arm": arm, "seed": 0, "number": number}
        records.write(tmp_path / "runs" / f"sort-en-{arm}-0.json", [run])

    def found():
        return {run["arm"]: run["number"] for run in records.read(tmp_path / "runs.parquet")}

    monkeypatch.setattr(command, "execute", execute)
    monkeypatch.setattr(command, "write_report", lambda folder: "")
    arguments = ["--families", "sort", "--seeds", "1", "--output", str(tmp_path), "--work", str(tmp_path / "work")]
    finish("rloo", 1)
    (tmp_path / "runs" / "sort-en-grpo-0.json").write_text(json.dumps({"family": "sort", "arm": "grpo"})[:-9])
    command.main([*arguments, "--arms", "rloo", "grpo", "sspo-0"])
    assert asked == [
        ("start models", ["sort-en-make-start-0"]),
        ("runs", ["sort-en-grpo-0", "sort-en-sspo-0-0"]),
    ]
    said = capsys.readouterr().out
    assert "sort-en-grpo-0.json is not whole" in said and "1 of 3 runs are recorded already" in said
    assert found() == {"rloo": 1, "grpo": 2, "sspo-0": 2} and not list((tmp_path / "runs").iterdir())
    asked.clear()
    command.main([*arguments, "--arms", "rloo", "sspo-0"])
    assert asked == [("start models", []), ("runs", [])] and len(found()) == 3
    command.main([*arguments, "--arms", "rloo", "--redo"])
    assert asked[-1] == ("runs", ["sort-en-rloo-0"]) and found()["rloo"] == 2 and len(found()) == 3


def test_pair_form(trainers):
    trainer = trainers[0]
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    curve, sampled = train_pairs(trainer, Task("sums"), PairArm(rounds=1, problems=4, per_update=4, epochs=1), seed=0)
    assert len(curve["accuracy"]) == 1 and sampled > curve["tokens"][0] * 4
    assert any((p != before[n]).any() for n, p in trainer.model.named_parameters())


def test_scored_rows(trainers):
    _, _, layout = _forward(trainers[0].model, [((3, 4, 5, 6), 3), ((3, 4, 7), 1)], 0)
    assert layout.labels.tolist() == [6, 4, 7] and layout.num_steps == 2
