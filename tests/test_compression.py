"""The compression benchmark's controls, arithmetic and report; one pair-form update."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.compression.__main__ import parse
from benchmarks.compression.arms import ARMS, DECISIVE, ShuffledValues, ZeroValues
from benchmarks.compression.pairs import PairArm, _forward, train_pairs
from benchmarks.compression.report import _accuracy, best_penalty, commands, write_report
from benchmarks.compression.verdicts import difference, pair_verdicts, verdicts
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
    (tmp_path / "runs").mkdir()
    for arm, bits in (("penalty-0.25", [1, 1, 0, 0]), ("penalty-0.5", [1, 1, 1, 0]), ("sspo-0", [1, 1, 1, 1])):
        for seed in (0, 1):
            correct = bits if seed else [1, 1, 0, 0]
            numbers = {"correct": correct, "tokens": [5, 6, 7, 8], "steps": [2] * 4, "skipped": [0] * 4}
            run = {"family": "sums", "language": "en", "arm": arm, "seed": seed, "updates": 3, "held_out": 4,
                   "seconds": 1.0, "sampled_tokens": 1000, "greedy": numbers, "sampled": numbers}  # fmt: skip
            (tmp_path / "runs" / f"{arm}-{seed}.json").write_text(json.dumps(run))
    text = write_report(tmp_path)
    assert "length penalty 0.5 (the best of those run)" in text and "0.25 (the best" not in text
    assert "| SSPO, lambda 0 | 2 | 0.750 ± 0.283 [0.500, 1.000] | 6.5 |" in text
    assert (tmp_path / "sums-en.png").exists() and (tmp_path / "RESULTS.md").read_text() == text
    assert "`python -m benchmarks compression --families sums --languages en --seeds 2 --arms penalty-0.25 " in text
    assert best_penalty({}) is None
    assert _accuracy([[1, 1, 1]]) == "1.000 ± 0.000"


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
    assert rows == [f"| sums, en | DPO on whole solutions + likelihood | {better} | {better} | {worse} | {worse} |"]
    assert pair_verdicts({("sums", "en"): {"sspo-0": arms["pairs"]}}) == ""


def test_pair_form(trainers):
    trainer = trainers[0]
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    curve, sampled = train_pairs(trainer, Task("sums"), PairArm(rounds=1, problems=4, per_update=4, epochs=1), seed=0)
    assert len(curve["accuracy"]) == 1 and sampled > curve["tokens"][0] * 4
    assert any((p != before[n]).any() for n, p in trainer.model.named_parameters())


def test_scored_rows(trainers):
    _, _, layout = _forward(trainers[0].model, [((3, 4, 5, 6), 3), ((3, 4, 7), 1)], 0)
    assert layout.labels.tolist() == [6, 4, 7] and layout.num_steps == 2
