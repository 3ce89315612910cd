# SPDX-License-Identifier: Apache-2.0
"""docs/rl.md against what the trainer logs.

Mutations that turned the test red: a name taken out of the page; a metric of the loss logged beside the others.
"""

import re

import pytest

pytest.importorskip("transformers")
from helpers.paths import DOCS
from helpers.rl import ROWS, make_trainer

PAGE = (DOCS / "rl.md").read_text(encoding="utf-8")
TRAINERS = {"loss", "grad_norm", "learning_rate", "epoch", "step", "total_flos", "num_input_tokens_seen"}


def logged(tmp_path, **options) -> set[str]:
    trainer = make_trainer(tmp_path, max_steps=2, eval_dataset=ROWS, **options)
    trainer.train()
    trainer.evaluate()
    names = {name for entry in trainer.state.log_history for name in entry}
    return {name for name in names if name not in TRAINERS and not name.startswith("train_")}


def test_every_name_that_is_logged_is_in_the_page(tmp_path):
    section = PAGE.partition("## What is logged")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    evaluation = set(re.findall(r"`(eval_[^`]+)`", section))
    documented = evaluation | {name for row in rows for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])}
    bare = logged(tmp_path / "bare")
    conditional = {"entropy", "kl", "ratio/mean", *(n for n in documented if n.startswith("clip_ratio/"))}
    assert bare == documented - conditional
    options = {"loss_type": "ppo", "num_iterations": 2, "entropy_coef": 0.01, "beta": 0.1}
    assert logged(tmp_path / "full", **options) == documented
