# SPDX-License-Identifier: Apache-2.0
"""--version, --config, --dry-run, --push-to-hub and the model card: what users of TRL's command line expect.

Mutations, each caught by the test named:
  the config file comes after the command line                    test_the_command_line_comes_first
  an unknown key is passed over                                   test_a_config_that_does_not_fit
  a dry run goes on to train                                      test_a_dry_run_of_pairs
  the card names the model's whole path                           test_a_card_beside_every_saved_model
  the upload comes before the card                                test_push_to_hub
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

from helpers.rl import ROWS, make_model, make_tokenizer

import sspo_ext
from sspo_ext.cli.main import main, parsed

NEEDED = ["--model", "m", "--data", "d", "--output-dir", "o"]


def config(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return ["--config", str(path)]


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"sspo-ext {sspo_ext.__version__}\n"


# ---- --config


def test_every_option_can_stand_in_a_config(tmp_path):
    """Each option of each command, with a value of its kind, gives what the command line gives."""
    import argparse

    from sspo_ext.cli.main import build_parser

    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    seen = 0
    for name, command in commands.choices.items():
        for action in command._actions:
            option = action.option_strings[0][2:]
            if option in ("h", "help", "config") or action.option_strings[0] == "-h":
                continue
            tokens, line = _example(action)
            required = [] if name in ("info", "demo") else NEEDED[: 6 if name != "probe" else 4]
            required = [x for x in required if f"--{option}" not in required or x not in _pair(required, f"--{option}")]
            given = parsed([name, *config(tmp_path, f"{option.replace('-', '_')}: {line}\n"), *required])
            told = parsed([name, *required, *tokens])
            assert getattr(given, action.dest) == getattr(told, action.dest) != command.get_default(action.dest), option
            seen += 1
    assert seen > 120


def _pair(tokens, name):
    at = tokens.index(name)
    return tokens[at : at + 2]


def _example(action):
    """(arguments of the command line, value in YAML) of an option, other than its default."""
    import argparse

    name = action.option_strings[0]
    if isinstance(action, argparse.BooleanOptionalAction):
        return ([f"--no-{name[2:]}"], "false") if action.default else ([name], "true")
    if action.nargs == 0:
        return [name], "true"
    if isinstance(action, argparse._AppendAction):
        if action.metavar in (None, "TEXT"):
            return [name, "a b", name, "c"], '["a b", c]'
        return [name, "a=1", name, "b=0.5"], "{a: 1, b: 0.5}"
    value = next((c for c in action.choices or () if c != action.default), None)
    for one in (value, "7", "1", "yes", "text"):
        try:
            if one is not None and (action.type is None or action.type(one) != action.default):
                break
        except (ValueError, argparse.ArgumentTypeError):
            continue
    many = action.nargs == "+"
    return [name, one] + (["8"] if many and one == "7" else []), f"[{one}, 8]" if many and one == "7" else one


def test_the_command_line_comes_first(tmp_path):
    given = config(tmp_path, "lr: 1e-6\nbf16: true\nprefix_sharing: no\nloss-option: {a: 1}\neval_steps:\n")
    options = parsed(["train", *NEEDED, *given, "--lr", "3e-6", "--loss-option", "b=2"])
    assert (options.lr, options.bf16, options.prefix_sharing, options.seed) == (3e-6, True, False, 0)
    assert options.eval_steps is None
    assert options.loss_option == [("a", 1.0), ("b", 2.0)]


def test_small_numbers_are_no_options(tmp_path):
    given = config(tmp_path, "reward_weights: [1, -0.00001, -1.0e-9, 0.0]\n")
    options = parsed(["rl", *NEEDED, *given])
    assert options.reward_weights == [1.0, -1e-5, -1e-9, 0.0]


@pytest.mark.parametrize(
    "text, message",
    (
        ("learning_rate: 1", "'learning_rate' is no option of this command"),
        ("batch_sise: 1", "'batch_sise' is no option of this command; is batch-size meant?"),
        ("config: x", "'config' is no option"),
        ("bf16: 1", "bf16: expected true or false, got 1"),
        ("lr:", "lr: expected a value, got null; leave it out for the default"),
        ("lr: [1, 2]", "lr: expected one value, got [1, 2]"),
        ("lr: fast", "argument --lr: expected a finite number, 0 or above, got 'fast'"),
        ("- lr", "expected options by their names, got list"),
        ("lr: [", "no YAML: "),
    ),
)
def test_a_config_that_does_not_fit(tmp_path, capsys, text, message):
    with pytest.raises(SystemExit) as stop:
        main(["train", *NEEDED, *config(tmp_path, text)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_config_that_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config", str(tmp_path / "none.yaml")])
    assert stop.value.code == 2
    assert "none.yaml" in capsys.readouterr().err


# ---- runs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def pairs(tmp_path):
    rows = [{"prompt": f"{a}+1=\n", "chosen": f"{a}: 1\n#{a}", "rejected": f"{a}: 2\n#0"} for a in range(1, 6)]
    return write(tmp_path / "pairs.jsonl", [*rows, {"prompt": "1\n", "chosen": "2", "rejected": "2"}])


def train(model, pairs, out, *more):
    some = ("--max-steps", "2", "--logging-steps", "1", "--save-steps", "1", "--lr", "1e-2", "--skip-equal")
    return main(["train", "--model", model, "--data", pairs, "--output-dir", str(out), *some, *more])


def test_a_dry_run_of_pairs(model, pairs, tmp_path, capsys):
    assert train(model, pairs, tmp_path / "out", "--dry-run") == 0
    text = capsys.readouterr().out
    assert "5 rows, 10 pairs of steps" in text
    assert (
        "== " + pairs + ":1\n-- chosen: 13 tokens\n[1+1=\n]\n0: 1: 1\n\n1: #1<eos>\n"
        "-- rejected: 13 tokens\n[1+1=\n]\n0: 1: 2\n\n1: #0<eos>\n"
        "-- pairs, chosen > rejected: 0 > 0, 1 > 1; weight 1, margin 0\n"
    ) in text
    assert text.count("== ") == 3
    assert not (tmp_path / "out").exists()


def test_colours_only_on_a_terminal(model, pairs, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert train(model, pairs, tmp_path / "out", "--dry-run") == 0
    assert "0: \x1b[30;44m1: 1\n\x1b[0m\n1: \x1b[30;45m#1<eos>\x1b[0m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert train(model, pairs, tmp_path / "out", "--dry-run") == 0
    assert "\x1b" not in capsys.readouterr().out


def test_a_dry_run_of_prompts(model, tmp_path, capsys):
    data = write(tmp_path / "problems.jsonl", ROWS)
    command = ["rl", "--model", model, "--output-dir", str(tmp_path / "out"), "--probe", "#", "--dry-run"]
    assert main([*command, "--data", data]) == 0
    text = capsys.readouterr().out
    assert "16 rows, 8 completions of each\n\n== 5 tokens\n[1+1=\n]\n-- answer: '2'\n-- after each step: '#'\n" in text
    assert text.count("== ") == 3 and not (tmp_path / "out").exists()
    bad = write(tmp_path / "bad.jsonl", [*ROWS, {"prompt": [{"role": "user", "content": "1"}], "answer": "1"}])
    assert main([*command, "--data", bad]) == 2  # all rows are looked at
    assert "prompt: expected a text" in capsys.readouterr().err


@pytest.mark.parametrize("lora", (False, True))
def test_a_card_beside_every_saved_model(model, pairs, tmp_path, lora):
    from huggingface_hub import ModelCard

    out = tmp_path / "my-model"
    more = ("--lora-r", "2", "--lora-target-modules", "q_proj", "v_proj") if lora else ()
    assert (
        train(model, pairs, out, "--weight-decay", "0.25", "--save-total-limit", "1", "--loss-type", "ipo", *more) == 0
    )
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    for folder in (out, out / "checkpoint-2"):
        card = ModelCard.load(folder / "README.md")
        assert card.data.library_name == ("peft" if lora else "transformers")
        assert card.data.tags == ["sspo_ext"] and card.data.base_model is None  # a folder is no name on the hub
        assert str(tmp_path) not in card.content and model not in card.content
        assert "# my-model" in card.content and "| loss_type | `ipo` |" in card.content
        assert "2 updates by `StepPreferenceTrainer`" in card.content and "| weight_decay | `0.25` |" in card.content
        assert "| loss | " in card.content and ("This is an adapter (LORA) of" in card.content) == lora
    if lora:
        found = json.loads((out / "adapter_config.json").read_text())["target_modules"]
        assert sorted(found) == ["q_proj", "v_proj"]


def test_a_readme_of_someone_else_stays(model, pairs, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("# My project with sspo_ext\n")
    assert train(model, pairs, out) == 0
    assert (out / "README.md").read_text() == "# My project with sspo_ext\n"
    assert "sspo_ext" in (out / "checkpoint-2" / "README.md").read_text()


def test_a_card_of_a_model_of_the_hub():
    from sspo_ext.train.model_card import _name

    assert _name("org/model") == "org/model" and _name("gpt2") == "gpt2"
    assert _name("/somewhere/deep/model") == "model" and _name("a/b/model") == "model" and _name(".") == ""


@pytest.mark.parametrize("every_save", (False, True))
def test_push_to_hub(model, pairs, tmp_path, monkeypatch, every_save):
    """Creating the repository and the upload are all that is replaced: what would be sent is looked at."""
    sent = []

    def upload(self, *, repo_id, folder_path, **more):
        card = Path(folder_path) / "README.md"
        known = card.is_file() and 'load_model("me/mine")' in card.read_text()
        sent.append((repo_id, (Path(folder_path) / "model.safetensors").exists(), known))
        return SimpleNamespace(done=lambda: True, result=lambda: None)

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, name, **more: SimpleNamespace(repo_id=name))
    if every_save:  # as one may ask for in a program of one's own
        from sspo_ext.cli import train as command

        arguments = command.training_arguments
        more = {"hub_strategy": "every_save"}
        monkeypatch.setattr(command, "training_arguments", lambda *args, **given: arguments(*args, **given) | more)
    assert train(model, pairs, tmp_path / "out", "--push-to-hub", "--hub-model-id", "me/mine") == 0
    assert len(sent) >= 2 if every_save else len(sent) == 1
    assert set(sent) == {("me/mine", True, True)}


def test_push_to_hub_offline(model, pairs, tmp_path, capsys):
    assert train(model, pairs, tmp_path / "out", "--push-to-hub") == 2
    assert "sspo-ext train: error: " in capsys.readouterr().err


def test_a_name_on_the_hub_without_a_push(model, pairs, tmp_path, capsys):
    assert train(model, pairs, tmp_path / "out", "--hub-model-id", "me/mine") == 2
    assert "--hub-model-id: has no effect without --push-to-hub" in capsys.readouterr().err
