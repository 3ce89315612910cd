# SPDX-License-Identifier: Apache-2.0
"""A model's file that is cut off, and a package that is not there: one sentence, before anything is trained.

All were red before: a SafetensorError or an ImportError as a traceback, a JSONDecodeError without the file, and a
missing optimiser only after the reference pass.
"""

import shutil

import pytest

pytest.importorskip("transformers")

from helpers import preference, rl
from helpers.preference import make_features, make_model
from helpers.tokenizer import byte_tokenizer

from sspo_ext.cli.main import main
from sspo_ext.train.loading_errors import broken_file
from sspo_ext.train.models import load_model
from sspo_ext.train.preference_trainer import StepPreferenceTrainer

PAIR = '{"prompt": "1 + 1 = ", "chosen": "2", "rejected": "3"}\n'


@pytest.fixture
def folder(tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "file, size, message",
    (
        ("model.safetensors", 2000, "is no whole safetensors file: "),
        ("model.safetensors", 3, "is no whole safetensors file: "),
        ("tokenizer.json", 2000, "is no JSON: "),
        ("tokenizer_config.json", 30, "is no JSON: "),
        ("config.json", 100, "not a valid JSON file"),
    ),
)
def test_a_file_that_is_cut_off(folder, file, size, message):
    content = (folder / file).read_bytes()
    assert len(content) > size
    (folder / file).write_bytes(content[:size])
    with pytest.raises((ValueError, OSError)) as error:
        load_model(folder)
    text = str(error.value)
    assert text.startswith("model: ") and str(folder / file) in text and message in text and "\n" not in text.strip()
    (folder / file).write_bytes(content)
    load_model(folder)
    assert broken_file(folder) is None


@pytest.mark.parametrize("command", ("train", "rl", "trace"))
def test_the_commands_say_it(folder, tmp_path, capsys, command):
    (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes()[:500])
    row = PAIR.replace("}", ', "answer": "2", "response": "2"}')
    (tmp_path / "rows.jsonl").write_text(row)
    files = ["--model", str(folder), "--data", str(tmp_path / "rows.jsonl"), "--output-dir", str(tmp_path / "out")]
    assert main([command, *files]) == 2
    assert f"sspo-ext {command}: error: model: {str(folder / 'tokenizer.json')!r} is no JSON" in capsys.readouterr().err


def test_an_adapter_that_is_cut_off(folder, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        load_model(folder)[0], peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    )
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.rmtree(tmp_path / "adapter", ignore_errors=True)
        model.save_pretrained(tmp_path / "adapter")
        (tmp_path / "adapter" / file).write_bytes((tmp_path / "adapter" / file).read_bytes()[:40])
        with pytest.raises(ValueError, match=f"^model: .*{file}.* is no "):
            load_model(tmp_path / "adapter")


def test_flash_attention_that_is_not_there(folder):
    from transformers.utils import is_flash_attn_2_available

    if is_flash_attn_2_available():
        pytest.skip("FlashAttention is here")
    with pytest.raises(
        ImportError, match=r"^model: .* cannot be loaded: Flash.*; install what is missing, or ask for .*"
    ):
        load_model(folder, attn_implementation="flash_attention_2")


@pytest.mark.parametrize("made", (preference.config, rl.config))
def test_reports_to_what_is_not_there(tmp_path, monkeypatch, made):
    module = "transformers.integrations.integration_utils"
    monkeypatch.setattr(f"{module}.get_available_reporting_integrations", lambda: ["mlflow"])
    for name in ("tensorboard", "wandb"):
        with pytest.raises(
            ImportError, match=f"^report_to: the package of '{name}' is not installed; .*pip install {name}"
        ):
            made(tmp_path, report_to=name)
    made(tmp_path, report_to=["mlflow"])
    made(tmp_path, report_to="none")


def test_optimisers_that_are_not_there(tmp_path, monkeypatch):
    missing = ImportError("You need to install `bitsandbytes`: `pip install bitsandbytes`")

    def of(args, model=None):
        raise missing

    monkeypatch.setattr("transformers.Trainer.get_optimizer_cls_and_kwargs", staticmethod(of))
    monkeypatch.setattr(
        "sspo_ext.train.referenced.add_reference", lambda *a, **k: pytest.fail("the reference pass has begun")
    )
    message = "^optim: 'adamw_8bit' cannot be used: You need to install `bitsandbytes`"
    with pytest.raises(ImportError, match=message):
        StepPreferenceTrainer(make_model(), preference.config(tmp_path, optim="adamw_8bit"), make_features())
    with pytest.raises(ImportError, match=message):
        rl.make_trainer(tmp_path, optim="adamw_8bit")


def test_an_optimiser_that_is_given_is_not_looked_for(tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr("transformers.Trainer.get_optimizer_cls_and_kwargs", lambda *a: pytest.fail("looked for one"))
    model = make_model()
    given = (torch.optim.SGD(model.parameters(), 0.1), None)
    StepPreferenceTrainer(model, preference.config(tmp_path), make_features(), optimizers=given)
