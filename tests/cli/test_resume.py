# SPDX-License-Identifier: Apache-2.0
"""`train` and `rl`: a run that was ended by a signal, a kill or an error goes on exactly, or says what is missing.

Kills at fixed points are slow: each command is run some 30 times (tests/helpers/kills.py).
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

pytest.importorskip("transformers")

from helpers.launch import torchrun
from helpers.paths import TESTS
from helpers.rl import ROWS, make_model, make_tokenizer
from safetensors.torch import load_file, save_file

from sspo_ext.cli.main import main
from sspo_ext.train.base import StepTrainer

COMMANDS = pytest.mark.parametrize("command", ["train", "rl"])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, and the rows of each command."""
    folder = tmp_path_factory.mktemp("files")
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    pairs = [
        {"prompt": row["prompt"], "chosen": f"a{n}\n# {row['answer']}", "rejected": f"b{n}\n#{n}"}
        for n, row in enumerate(ROWS[:8])
    ]
    for name, rows in (("train", pairs), ("rl", ROWS)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(files, command, out, *more):
    options = ["--model", files / "model", "--data", files / command, "--output-dir", out, "--lr", "1e-3"]
    options += ["--batch-size", "4", "--max-steps", "4", "--save-steps", "2", "--logging-steps", "1"]
    if command == "rl":
        options += ["--num-generations", "4", "--max-completion-length", "8", "--grader", "helpers.rl:reward"]
        options += [] if "outcome" in more else ["--probe", "#"]
    return main([command, *map(str, options), *more])


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """The folder of a finished run of each command."""
    found = {}
    for command in ("train", "rl"):
        found[command] = tmp_path_factory.mktemp(command) / "out"
        assert run(files, command, found[command]) == 0
    return found


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture
def out(finished, command, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(finished[command], tmp_path / "out")


# ---- what there is to resume


@COMMANDS
def test_a_finished_run_stays_as_it_is(files, command, out, capsys):
    before = contents(out)
    assert run(files, command, out, "--resume") == 0
    assert f"{out} is finished, after 4 updates; nothing is changed" in capsys.readouterr().out
    assert contents(out) == before
    assert run(files, command, out, "--max-steps", "6", "--resume") == 0, "and goes on to more updates"
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 6
    assert weights(out) != before["model.safetensors"]


@COMMANDS
def test_a_model_that_was_not_saved_is_saved(files, command, out, capsys):
    before = contents(out)
    for name in ("trainer_state.json", "model.safetensors"):
        (out / name).unlink()
    assert run(files, command, out, "--resume") == 0
    assert f"going on from {out / 'checkpoint-4'}" in capsys.readouterr().out
    now = contents(out)
    assert weights(out) == before["model.safetensors"]
    assert {n: b for n, b in now.items() if n.startswith("check")} == {
        n: b for n, b in before.items() if n.startswith("check")
    }


@COMMANDS
def test_the_newest_whole_checkpoint_is_taken(files, command, out, finished, capsys):
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-5-old")
    (out / "checkpoint-4" / "trainer_state.json").unlink()  # killed while it was written, by an older version
    (out / "trainer_state.json").unlink()
    (out / "model.safetensors").unlink()
    assert run(files, command, out, "--resume") == 0
    assert f"going on from {out / 'checkpoint-2'}" in capsys.readouterr().out
    assert weights(out) == weights(finished[command])


@COMMANDS
def test_a_run_without_a_checkpoint_starts_anew(files, command, finished, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(files, command, out, "--resume") == 2
    assert "no run has begun there" in capsys.readouterr().err
    out.mkdir()
    assert run(files, command, out, "--resume") == 0
    assert f"no checkpoint in {out}; starting anew" in capsys.readouterr().out
    assert weights(out) == weights(finished[command])


@COMMANDS
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_lacks_a_file(files, command, out, capsys, name):
    (out / "checkpoint-4" / name).unlink()
    (out / "trainer_state.json").unlink()
    before = contents(out)
    assert run(files, command, out, "--resume", "--max-steps", "6") == 2
    error = capsys.readouterr().err
    assert f"error: resume: {name} is missing in '{out / 'checkpoint-4'}'" in error and "Traceback" not in error
    assert contents(out) == before


# ---- what is loaded and saved


@COMMANDS
def test_a_model_that_lacks_a_weight(files, command, tmp_path, capsys):
    model = shutil.copytree(files / "model", tmp_path / "model")
    found = load_file(model / "model.safetensors")
    del found["lm_head.weight"]
    save_file(found, model / "model.safetensors", metadata={"format": "pt"})
    assert run(files, command, tmp_path / "out", "--model", str(model)) == 2
    assert f"error: model: '{model}' lacks 1 weights (lm_head.weight)" in capsys.readouterr().err
    assert not (tmp_path / "out" / "model.safetensors").exists()


@COMMANDS
def test_a_learning_rate_that_is_far_too_high(files, command, tmp_path, capsys):
    own = ("--combine", "outcome") if command == "rl" else ()
    assert run(files, command, tmp_path, "--lr", "1e30", *own) == 2
    error = capsys.readouterr().err
    assert "error: loss: expected a finite number, got nan after" in error and "Traceback" not in error
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_held_out_loss_that_is_not_finite(files, tmp_path, capsys):
    """One update: the weights are finite, and the loss would be printed as nan."""
    data = str(files / "train")
    assert run(files, "train", tmp_path, "--lr", "1e30", "--max-steps", "1", "--eval-data", data) == 2
    assert "error: eval_loss: expected a finite number, got nan after 1 updates" in capsys.readouterr().err
    assert not (tmp_path / "model.safetensors").exists()


# ---- signals


def signal_in_update(monkeypatch, number, update):
    """Sends a signal while that update is made."""
    step, count = StepTrainer.training_step, 0

    def training_step(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count == update:
            signal.raise_signal(number)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(StepTrainer, "training_step", training_step)


@pytest.fixture(autouse=True)
def signals_as_in_a_shell():
    """A job in the background of a script ignores SIGINT, and so would its tests."""
    wanted = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@COMMANDS
@pytest.mark.parametrize("number,status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves(files, command, finished, tmp_path, capfd, monkeypatch, number, status):
    out, handlers = tmp_path / "out", (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    with monkeypatch.context() as patch:
        signal_in_update(patch, number, 3)
        assert run(files, command, out) == status
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    error = capfd.readouterr().err
    place = re.escape(str(out / "checkpoint-3"))
    assert re.search(rf"stopped after update 3 of 4; it is in {place}; give the same command with --resume", error)
    assert "once more: at once" in error and "Traceback" not in error
    assert not (out / "model.safetensors").exists()
    assert run(files, command, out, "--resume") == 0
    assert weights(out) == weights(finished[command])


def test_a_signal_between_two_updates_on_the_same_rollouts(files, tmp_path, monkeypatch):
    more = ("--num-iterations", "2", "--loss-type", "ppo")
    assert run(files, "rl", tmp_path / "whole", *more) == 0
    with monkeypatch.context() as patch:
        signal_in_update(patch, signal.SIGINT, 1)
        assert run(files, "rl", tmp_path / "out", *more) == 130
    assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    assert run(files, "rl", tmp_path / "out", *more, "--resume") == 0
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


@COMMANDS
def test_a_signal_before_training(files, command, finished, tmp_path, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StepTrainer, "planned_updates", interrupted)
        assert run(files, command, tmp_path) == 130
    error = capsys.readouterr().err
    assert f"sspo-ext {command}: interrupted; give the same command with --resume to go on" in error
    assert "Traceback" not in error
    assert run(files, command, tmp_path, "--resume") == 0
    assert weights(tmp_path) == weights(finished[command])


def test_a_signal_that_is_ignored_stays_ignored(files, tmp_path, monkeypatch):
    """As under nohup, or in the background of a shell script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        signal_in_update(monkeypatch, signal.SIGINT, 1)
        assert run(files, "train", tmp_path) == 0
    finally:
        signal.signal(signal.SIGINT, before)


def in_another_process(code, *arguments):
    """What Python code prints, with one thread, so that it can fork."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    command = [sys.executable, *code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@COMMANDS
def test_kills_at_fixed_points(command):
    printed = in_another_process(["-m", "helpers.kills"], command, "points")
    print(printed)
    assert re.search(rf"\| {command} \| (\d\d) \| \1 \| 0 \| 0 \|", printed), printed


_TWICE = """
import signal, sys
from helpers.kills import Runs
from sspo_ext.train.base import StepTrainer

def before():
    step = StepTrainer.training_step
    def twice(self, *args, **kwargs):
        if self.state.global_step == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return step(self, *args, **kwargs)
    StepTrainer.training_step = twice

runs = Runs("train", sys.argv[1])
assert runs.run("whole") == 0
print(runs.run("out", before=before), runs.resumed("out", "whole"), "Traceback" in runs.log("out").read_text())
"""


@pytest.mark.slow
def test_the_second_ctrl_c_leaves_at_once(tmp_path):
    assert in_another_process(["-c", _TWICE], tmp_path).split() == [str(-signal.SIGINT), "equal", "False"]


@pytest.mark.slow
@COMMANDS
def test_two_processes_go_on_exactly(files, command, tmp_path):
    own = ("--num-generations", "4", "--max-completion-length", "8", "--probe", "#", "--grader", "helpers.rl:reward")
    options = ["--model", files / "model", "--data", files / command, "--lr", "1e-3", "--batch-size", "2"]
    options += ["--max-steps", "4", "--save-steps", "2", *(own if command == "rl" else ())]
    torchrun("sspo_ext.cli.main", command, *options, "--output-dir", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    torchrun("sspo_ext.cli.main", command, *options, "--output-dir", tmp_path / "out", "--resume")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert {p.name for p in (tmp_path / "out" / "checkpoint-4").glob("rng*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    assert not (tmp_path / "out" / "unfinished").exists()
    with pytest.raises(AssertionError, match="rng_state.pth is missing .another number of processes"):
        torchrun("sspo_ext.cli.main", command, *options, "--output-dir", tmp_path / "out", "--max-steps", "6",
                 "--gradient-accumulation", "2", "--resume", processes=1)  # fmt: skip
