# SPDX-License-Identifier: Apache-2.0
"""`sspo-ext rl` and `sspo-ext train` under torchrun on CPUs: one job, which trains what one process trains.

The differences of the weights are printed (pytest -s). Mutations: no use_cpu in a command -> its test, by the trainer's
refusal; nor that -> the last test, and "saved to" is there twice; a model that was evaluated stays marked as prepared
-> [train], whose processes then train by themselves.
"""

import json

import pytest
import torch

pytest.importorskip("transformers")
from helpers.launch import torchrun
from helpers.preference import config as pair_config
from helpers.preference import make_features
from helpers.preference import make_model as make_pair_model
from helpers.rl import ROWS, config, make_model, make_tokenizer, reward
from safetensors.torch import load_file

PAIRS = [
    {"prompt": row["prompt"], "chosen": f"a{n}\n# {row['answer']}", "rejected": f"b{n}+\n#{n}"}
    for n, row in enumerate(ROWS[:8])
]


def run(command, data, model, out, processes, *more):
    """What is printed, and the weights."""
    options = ["--model", model, "--data", data, "--output-dir", str(out), "--lr", "1e-3", "--max-steps", "3", *more]
    printed = torchrun("sspo_ext.cli.main", command, *options, processes=processes)
    weights = load_file(out / "model.safetensors")
    return printed, torch.cat([weights[name].reshape(-1) for name in sorted(weights)])


@pytest.mark.slow
@pytest.mark.parametrize("command", ["rl", "train"])
def test_two_processes_are_one_job(command, tmp_path):
    model = tmp_path / "model"
    make_model().save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in (ROWS if command == "rl" else PAIRS)))
    more = ("--num-generations", "4", "--max-completion-length", "10", "--probe", "#", "--grader", "helpers.rl:reward")
    more = ("--eval-data", str(data), "--batch-size", "2", *(more if command == "rl" else ()))
    found = []
    for processes in (1, 2):  # the same 8 rows in every update
        accumulation = ("--gradient-accumulation", str(4 // processes))
        found.append(run(command, str(data), str(model), tmp_path / str(processes), processes, *more, *accumulation))
    (one_text, one), (two_text, two) = found
    before = load_file(model / "model.safetensors")
    moved = (one - torch.cat([before[name].reshape(-1) for name in sorted(before)])).abs().max()
    difference = (one - two).abs().max()
    print(f"\n{command}, 3 updates, lr 1e-3, AdamW: weights move by {moved:.1e}, and differ by {difference:.1e}")
    assert two_text.count("saved to") == one_text.count("saved to") == 1 == two_text.count("| held-out")
    assert moved > 1e-3 and difference < moved / 100


def test_processes_that_know_nothing_of_each_other_are_refused(tmp_path, monkeypatch):
    """As under torchrun without use_cpu: Trainer joins the processes of GPUs alone."""
    from sspo_ext.train.preference_trainer import StepPreferenceTrainer
    from sspo_ext.train.sspo_trainer import SSPOTrainer

    args, pair_args = config(tmp_path), pair_config(tmp_path)
    assert args.world_size == pair_args.world_size == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = r"use_cpu: expected 2 processes in one job \(WORLD_SIZE\), got 1 on 'cpu'; give use_cpu=True"
    with pytest.raises(ValueError, match=message):
        StepPreferenceTrainer(make_pair_model(), pair_args, make_features(4))
    with pytest.raises(ValueError, match=message):
        SSPOTrainer(make_model(), args, reward, ROWS, processing_class=make_tokenizer())
