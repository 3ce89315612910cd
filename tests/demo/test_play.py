# SPDX-License-Identifier: Apache-2.0
"""What the examples share.

Mutations, each caught by the test named: completions of another prompt, no seed, the newline of a cut one left out
(test_complete); wrong before right (test_sampled_pairs); greedy for sampled (test_score); the end of sequence left
out, or the prompt scored (test_policy_batch); the sampler not used (test_train); the reference trained (test_dpo); two
digits (test_table); the sizes exchanged (test_sized); as many threads as before (test_one_thread).
"""

import copy
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")
from sspo_ext.demo import play
from sspo_ext.losses.logps import step_logps


@pytest.fixture(scope="module")
def start():
    return play.load_start()


def test_one_thread():
    """On two cores that others use as well, two threads of such a model took ten times as long as one."""
    code = "import torch; torch.set_num_threads(2); import sspo_ext.demo.play; print(torch.get_num_threads())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert (
        subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True).stdout == b"1\n"
    )


def test_sized(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py"])
    assert play.sized(5, 2) == 5
    monkeypatch.setattr(sys, "argv", ["x.py", "--quick"])
    assert play.sized(5, 2) == 2


def test_complete(start):
    """Greedy texts do not depend on the batch; a text that ended has no newline at its end, one cut off has."""
    prompts = ["6 + 13 = ? \n", "2 + 3 + 4 + 5 = ? \n"]
    together = play.complete(*start, prompts, temperature=0.0)
    assert together == [play.complete(*start, [prompt], temperature=0.0)[0] for prompt in prompts]
    assert all("####" in text and not text.endswith("\n") for text in together)
    (cut,) = play.complete(*start, prompts[:1], temperature=0.0, max_new_tokens=4)
    assert cut.endswith(" \n") and together[0].startswith(cut.strip())
    sampled = [play.complete(*start, prompts * 4, seed=seed) for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_sampled_pairs(start):
    task = play.Task("sums")
    problems = task.problems(6, seed=3, held_out=False)
    rows = play.sampled_pairs(*start, task, problems)
    assert rows
    answers = {p.prompt: p.answer for p in problems}
    for row in rows:
        assert task.reward(row["prompt"], row["chosen"], answers[row["prompt"]]) == 1
        assert task.reward(row["prompt"], row["rejected"], answers[row["prompt"]]) == 0


def test_score(start):
    task = play.Task("sums")
    problems = task.problems(12, seed=3, held_out=True)
    found = play.score(*start, task, problems)
    texts = play.complete(*start, [p.prompt for p in problems], temperature=0.0)
    assert found["greedy"] == sum(task.final_answer(t) == p.answer for p, t in zip(problems, texts, strict=True)) / 12
    assert found["tokens"] == sum(len(t.split(" ")) for t in texts) / 12


def test_policy_batch(start):
    tokenizer = start[1]
    batch = play.policy_batch(
        tokenizer, ["6 + 13 = ? \n", "2 + 3 = ? \n"], [["6 + 13 = 19 \n ", "#### 19"], ["so far \n"]]
    )
    layout, ids = batch["layout"], batch["inputs"]["input_ids"]
    assert layout.counts.tolist() == [6, 3, 3]  # with an end of sequence, and without one after a newline
    tokens = ids.flatten()[layout.places]
    assert tokenizer.decode(tokens[:6]).split(" ") == ["6", "+", "13", "=", "19", "\n"]
    assert tokens[8] == tokenizer.eos_token_id
    assert batch["inputs"]["attention_mask"].sum(1).tolist() == [6 + 9, 6 + 3]
    assert [len(steps) for steps in batch["batch"].step_ids] == [2, 1]


def rows_of(tokenizer, count=4):
    rows = [{"prompt": f"{n} + 3 = ? \n", "chosen": f"#### {n + 3}", "rejected": f"#### {n + 4}"} for n in range(count)]
    return play.features(rows, tokenizer, pair_by="sequence")


def test_train(start):
    """The sampler's order, batch by batch, and only parameters with a gradient."""
    model, tokenizer = copy.deepcopy(start[0]), start[1]
    rows, seen = rows_of(tokenizer), []
    model.lm_head.weight.requires_grad_(False)
    before = model.lm_head.weight.clone(), model.model.layers[0].mlp.up_proj.weight.clone()

    def loss(batch):
        seen.append(batch["inputs"]["input_ids"][:2, 0].tolist())
        return -step_logps(model(**batch["inputs"]).logits, batch["layout"]).sums.mean()

    losses = play.train(model, rows, loss, updates=3, batch_size=2, sampler=[3, 2, 1, 0])
    number = [row["chosen_input_ids"][0] for row in rows]
    assert seen == [[number[3], number[2]], [number[1], number[0]], [number[3], number[2]]]
    assert losses[2] < losses[0]
    assert torch.equal(model.lm_head.weight, before[0]) and not torch.equal(
        model.model.layers[0].mlp.up_proj.weight, before[1]
    )


def test_dpo(start):
    """The first loss is log 2, the margin grows, and the reference stays as it is."""
    model, tokenizer = copy.deepcopy(start[0]), start[1]
    kept = {name: value.clone() for name, value in start[0].state_dict().items()}
    first = play.dpo(model, start[0], rows_of(tokenizer), updates=1, batch_size=4)
    last = play.dpo(model, start[0], rows_of(tokenizer), updates=5, batch_size=4)
    assert first.loss.item() == pytest.approx(0.6931, abs=1e-4)
    assert last.metrics["rewards/margins"] > 0.1
    assert all(torch.equal(value, kept[name]) for name, value in start[0].state_dict().items())


def test_table():
    assert play.table([{"a": 1, "b": 0.25}, {"a": "x", "b": ""}]).splitlines() == [
        "| a | b |", "| --- | --- |", "| 1 | 0.250 |", "| x |  |",
    ]  # fmt: skip
