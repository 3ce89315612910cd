# SPDX-License-Identifier: Apache-2.0
"""`sspo-ext rl`: a whole run from a file, resume, and one message for every mistake."""

import argparse
import json
import sys

import pytest

from sspo_ext.cli.main import main

pytest.importorskip("transformers")

from helpers.rl import ROWS, make_model, make_tokenizer

from sspo_ext.train import models

CHINESE = [{"prompt": f"检查 {n}🙂\n", "answer": str(n)} for n in range(8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "problems.jsonl", ROWS)


def rl(model, data, out, *more):
    return main(
        ["rl", "--model", model, "--data", data, "--output-dir", str(out), "--batch-size", "4", "--num-generations",
         "4", "--max-completion-length", "10", "--lr", "1e-3", "--probe", "#", *more]
    )  # fmt: skip


def test_train_evaluate_draw_save_and_resume(model, data, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    more = (
        "--grader",
        "helpers.rl:reward",
        "--eval-data",
        data,
        "--max-steps",
        "4",
        "--save-steps",
        "2",
        "--beta",
        "0.01",
    )
    assert rl(model, data, out, *more) == 0
    text = capsys.readouterr().out
    assert "| accuracy |" in text and "| steps/mean |" in text
    assert (out / "model.safetensors").exists() and (out / "progress.png").read_bytes().startswith(b"\x89PNG")
    assert rl(model, data, out, *more) == 2
    assert "give --resume" in capsys.readouterr().err
    assert rl(model, data, out, *more, "--resume") == 0


@pytest.mark.parametrize(
    "more",
    [
        ("--lora-r", "2", "--rollout-engine", "compact", "--gradient-accumulation", "2", "--entropy-coef", "0.01"),
        (
            "--loss-type",
            "ppo",
            "--epsilon",
            "0.1",
            "--epsilon-high",
            "0.3",
            "--num-iterations",
            "2",
            "--baseline",
            "grpo",
        ),
        (
            "--combine",
            "outcome",
            "--probe",
            "en",
            "--aggregation",
            "sequence",
            "--route",
            "logits",
            "--grader",
            "exact:=",
        ),
        # GSPO, sampled answers, a nucleus
        (
            *("--loss-type", "ppo", "--epsilon", "3e-4", "--epsilon-high", "4e-4", "--top-p", "0.9", "--top-k", "9"),
            *("--loss-option", "importance_sampling_level=sequence", "--kl-estimator", "k2", "--beta", "0.1"),
            *("--probe-option", "mode=graded", "--probe-option", "num_samples=2", "--probe-end", "\n"),
        ),
    ],
)
def test_options_run(model, tmp_path, more):
    pytest.importorskip("peft")
    data = write(tmp_path / "chinese.jsonl", CHINESE)
    assert rl(model, data, tmp_path / "out", "--max-steps", "2", *more) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").exists() == ("--lora-r" in more)


@pytest.mark.parametrize(
    "more,message",
    [
        (("--data", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--model", "no-such-folder/at-all"), "no-such-folder/at-all"),
        (("--grader", "exakt"), "grader: expected 'exact'"),
        (("--grader", "nowhere:f"), "No module named 'nowhere'"),
        (("--loss-type", "grpo"), "got 'grpo'; GRPO's loss is called 'ppo'"),
        (("--batch-size", "3"), "to be a multiple of num_generations=4"),
        (("--gamma", "2"), "gamma: expected a number in [0, 1]"),
        (("--temperature", "0"), "temperature: expected a finite number above 0"),
        (("--probe-option", "samples=3"), "probe_options: expected some of mode"),
        (("--split-by", "newlines"), "'newlines' is none of"),
        (("--resume",), "--resume: no checkpoint"),
    ],
)
def test_mistakes_are_messages(model, data, tmp_path, capsys, monkeypatch, more, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    loaded, load = [], models.load_model
    monkeypatch.setattr(models, "load_model", lambda *a, **k: loaded.append(a) or load(*a, **k))
    assert rl(model, data, tmp_path / "out", "--max-steps", "1", *more) == 2
    error = capsys.readouterr().err
    assert "sspo-ext rl: error: " in error and message in error and "Traceback" not in error
    # a batch is that of all processes, of which the trainer knows
    assert bool(loaded) == (more[0] in ("--batch-size", "--model"))


def test_every_option_of_the_configuration_is_there():
    import dataclasses

    from transformers import TrainingArguments

    from sspo_ext.cli.main import build_parser
    from sspo_ext.train import SSPOConfig

    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    there = {action.dest for action in commands.choices["rl"]._actions}
    spelled = {"chat_template_kwargs": "chat_template_option"}
    own = {f.name for f in dataclasses.fields(SSPOConfig)} - {f.name for f in dataclasses.fields(TrainingArguments)}
    assert {spelled.get(name, name) for name in own} <= there | {f"{name}s" for name in there}


def test_settings():
    from sspo_ext.cli.arguments import setting

    given = ("delta=4", "epsilon=.5", "level=sequence", "thinking=false", "text=a=b", "empty=")
    assert dict(map(setting, given)) == {
        "delta": 4, "epsilon": 0.5, "level": "sequence", "thinking": False, "text": "a=b", "empty": "",
    }  # fmt: skip
    with pytest.raises(argparse.ArgumentTypeError, match="expected NAME=VALUE, got 'delta'"):
        setting("delta")


def test_a_missing_grader_names_its_own_extra(model, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert rl(model, data, tmp_path / "out", "--grader", "math-verify") == 2
    assert "pip install 'sspo-ext[graders]'" in capsys.readouterr().err
    assert rl(model, data, tmp_path / "out", "--grader", "nowhere:f") == 2
    assert "pip install" not in capsys.readouterr().err


@pytest.mark.parametrize("answer", [None, "", [], ["2", None], True])
def test_bad_answers_are_named_before_the_model_is_loaded(tmp_path, capsys, answer):
    path = write(tmp_path / "bad.jsonl", [*ROWS, {"prompt": "1", "answer": answer}])
    assert rl("no-model", path, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "1 of 17 rows" in error and "bad.jsonl:17: answer: expected a text" in error


def test_bad_rows_are_all_named(model, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "1"}\n{"prompt": "1", "answer": "2"}\n\nnot json\n{"prompt": [], "answer": 3}\n')
    assert rl(model, str(path), tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "3 of 4 rows" in error and all(f"bad.jsonl:{n}" in error for n in (1, 4, 5)) and "bad.jsonl:2" not in error
