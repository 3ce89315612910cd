# SPDX-License-Identifier: Apache-2.0
"""The console script: a whole training from files, and one message instead of a traceback for every mistake."""

import json
import re
import subprocess
import sys

import pytest
import torch

from sspo_ext.cli.main import main

pytest.importorskip("transformers")

ROWS = [
    {"prompt": f"Q: {a} + {b} + 1\n", "chosen": f"{a} + {b} = {a + b}\n{a + b} + 1 = {a + b + 1}\nA: {a + b + 1}",
     "rejected": f"{a} + {b} = {a + b}\n{a + b} + 1 = {a + b}\nA: {a + b}"}
    for a in range(2, 6) for b in range(3, 5)
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny random Llama with a character tokenizer, saved as any Hugging Face model is."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    words = ["<eos>", *sorted(set("".join(r[k] for r in ROWS for k in r)))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "pairs.jsonl", ROWS)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def train(model, data, out, *more):
    return main(
        [
            "train",
            "--model",
            model,
            "--data",
            data,
            "--output-dir",
            str(out),
            "--batch-size",
            "2",
            "--lr",
            "1e-2",
            *more,
        ]
    )


def test_train_evaluate_save_and_resume(model, data, tmp_path, capsys):
    out = tmp_path / "out"
    more = (
        "--eval-data",
        data,
        "--max-steps",
        "8",
        "--save-steps",
        "4",
        "--gradient-accumulation",
        "2",
        "--logging-steps",
        "2",
    )
    assert train(model, data, out, *more) == 0
    text = capsys.readouterr().out
    assert "8 rows, 16 pairs of steps" in text
    line = next(line for line in text.splitlines() if line.startswith("| loss"))
    before, after = (float(cell) for cell in line.split("|")[2:4])
    assert before == pytest.approx(0.6931, abs=1e-4) and after < before - 0.01
    assert (out / "model.safetensors").exists() and (out / "tokenizer.json").exists()
    # the same run again needs --resume, and then has nothing left to do
    assert train(model, data, out, *more) == 2
    assert "give --resume" in capsys.readouterr().err
    assert train(model, data, out, *more, "--resume") == 0


@pytest.mark.parametrize(
    "more",
    [
        ("--lora-r", "2", "--packing"),
        ("--loss-type", "simpo", "--loss-option", "simpo_gamma=0.3", "--pairing", "branch"),
        ("--loss-type", "sigmoid", "sft", "--loss-weights", "1", "0.2"),
        (
            "--loss-type",
            "ipo",
            "--pairing",
            "sequence",
            "--split-by",
            r"\. ",
            "--reference-free",
            "--gradient-checkpointing",
        ),
    ],
)
def test_options_run(model, data, tmp_path, more):
    pytest.importorskip("peft")
    assert train(model, data, tmp_path / "out", "--max-steps", "2", *more) == 0
    adapter = (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert adapter == ("--lora-r" in more)
    used = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    given = (["sigmoid", "sft"], [1.0, 0.2]) if "--loss-weights" in more else (used.loss_type, None)
    assert (used.loss_type, used.loss_weights) == given


@pytest.mark.parametrize(
    "more,message",
    [
        (("--data", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--model", "no-such-folder/at-all"), "no-such-folder/at-all"),
        (("--loss-type", "dpo"), "got 'dpo'; DPO's loss is called 'sigmoid'"),
        (("--loss-type", "sigmoid", "kto"), "loss_type: 'kto' needs more than a pair at a time"),
        (("--loss-type", "sigmoid", "sft", "--loss-weights", "1"), "loss_weights: expected 2 numbers"),
        (("--loss-option", "gamma=1"), "gamma: "),
        (("--beta", "0"), "beta: "),
        (("--split-by", "newlines"), "'newlines' is none of"),
        (("--resume",), "--resume: no checkpoint"),
        (("--max-length", "3"), "nothing to train on is left"),
        (("--label-smoothing", "0.7"), "label_smoothing: expected a number in [0, 0.5)"),
        (("--optim", "adamm"), "adamm"),
    ],
)
def test_mistakes_are_messages(model, data, tmp_path, capsys, monkeypatch, more, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    loaded = []
    monkeypatch.setattr("sspo_ext.train.models.load_model", lambda *a, **k: loaded.append(a))
    assert train(model, data, tmp_path / "out", "--max-steps", "1", *more) == 2
    error = capsys.readouterr().err
    assert not loaded and "sspo-ext train: error: " in error and message in error and "Traceback" not in error


def test_bad_rows_are_all_named(model, tmp_path, capsys):
    data = write(
        tmp_path / "bad.jsonl",
        [ROWS[0], {"prompt": "x", "chosen": "y"}, ROWS[1], {"prompt": "x", "chosen": 3, "rejected": "z"}],
    )
    assert train(model, data, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "bad.jsonl:2" in error and "bad.jsonl:4" in error and "bad.jsonl:1" not in error


@pytest.mark.parametrize("arguments", [[], ["train"], ["fly"], ["train", "--batch-size", "0"]])
def test_usage_errors(arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_traceback_on_request(model, tmp_path):
    with pytest.raises(OSError):
        train(model, "nowhere.jsonl", tmp_path / "out", "--traceback")


def test_info(capsys):
    assert main(["info"]) == 0
    assert "reference" in capsys.readouterr().out


def test_missing_extra_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "sspo_ext.demo", None)
    assert main(["demo", "--output-dir", str(tmp_path)]) == 2
    assert "pip install 'sspo-ext[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "rl", "probe", "trace", "demo"])
def test_help_names_each_default_once(command, capsys):
    """Mutation: argparse's own formatter -> red for all."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 0)" in text
    assert not re.findall(r"default: (?:None|False|\[\]|\))|\(default[^()]*\) \(default", text)


def test_info_and_hf_import_neither_transformers_nor_peft():
    code = """
import sys, sspo_ext.hf.head
from sspo_ext.cli.main import main
main(["info"])
assert not {"transformers", "peft"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_command_leaves_its_processes_group(tmp_path, capsys):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert main(["info"]) == 0
        assert not dist.is_initialized()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
