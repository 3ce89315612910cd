# SPDX-License-Identifier: Apache-2.0
"""An option that has no effect beside the others is an error, and so is a number out of its range.

All were red before: exit status 0, as if the option had been heard; `--max-steps 0` trained for an epoch, and a
learning rate of -1 or NaN was found after the reference pass. The cases of `trace`: tests/tracing/test_trace_inputs.py.
"""

import pytest

pytest.importorskip("transformers")

from sspo_ext.cli.main import main

FILES = ["--model", "none/such", "--data", "none.jsonl", "--output-dir", "out"]  # options come first


@pytest.mark.parametrize("command", ("train", "rl"))
@pytest.mark.parametrize(
    "more, message",
    (
        (("--eval-steps", "5"), "--eval-steps: has no effect without --eval-data"),
        (("--lora-alpha", "5"), "--lora-alpha: has no effect without --lora-r"),
        (("--route", "logits", "--chunk-bytes", "5"), "--chunk-bytes: has no effect with --route logits"),
        (("--max-steps", "5", "--epochs", "2"), "--epochs: has no effect with --max-steps"),
        (("--lr-scheduler", "constant", "--warmup-steps", "5"), "--warmup-steps: has no effect with --lr-scheduler"),
    ),
)
def test_of_both_trainings(capsys, command, more, message):
    assert main([command, *FILES, *more]) == 2
    assert f"sspo-ext {command}: error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, message",
    (
        (("--reference-free", "--reference-cache", "a"), "--reference-cache: has no effect without a reference"),
        (("--loss-type", "simpo", "--reference-cache", "a"), "--reference-cache: has no effect without a reference"),
        (
            ("--loss-type", "simpo", "--eval-batch-size", "3"),
            "--eval-batch-size: has no effect without a reference and",
        ),
    ),
)
def test_of_train(capsys, more, message):
    assert main(["train", *FILES, *more]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, message",
    (
        (("--eval-batch-size", "3"), "--eval-batch-size: has no effect without --eval-data"),
        (("--kl-estimator", "k1"), "--kl-estimator: has no effect without --beta"),
        *(
            (("--combine", "outcome", *more), f"{more[0]}: has no effect with --combine outcome")
            for more in (
                ("--gamma", "0.5"), ("--lam", "0.5"), ("--probe", "zh"), ("--probe-end", "."), ("--probe-turn",),
                ("--probe-option", "reduce=mean"), ("--step-scale", "2"), ("--min-signal", "0"),
            )
        ),
    ),
)  # fmt: skip
def test_of_rl(capsys, more, message):
    assert main(["rl", *FILES, *more]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ("train", "rl"))
def test_with_what_they_need(capsys, command):
    """The next thing that is wrong is the file."""
    more = ["--eval-data", "none.jsonl", "--eval-steps", "5", "--eval-batch-size", "3", "--chunk-bytes", "5"]
    more += ["--lr-scheduler", "cosine", "--warmup-steps", "5", "--epochs", "2", "--lora-r", "2", "--lora-alpha", "3"]
    assert main([command, *FILES, *more]) == 2
    assert "none.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("command", ("train", "rl"))
@pytest.mark.parametrize(
    "option, values",
    (
        ("--max-steps", ("0", "-2", "x", "1.5")),
        ("--epochs", ("-1", "nan", "inf", "x")),
        ("--lr", ("-1", "nan", "inf", "x")),
        ("--warmup-steps", ("-1", "x")),
        ("--seed", ("-1", "x")),
        ("--lora-r", ("-1", "x")),
        ("--lora-alpha", ("0", "x")),
    ),
)
def test_numbers_out_of_range(capsys, command, option, values):
    for value in values:
        with pytest.raises(SystemExit, match="2"):
            main([command, *FILES, f"{option}={value}"])
        assert f"argument {option}: expected a " in capsys.readouterr().err
