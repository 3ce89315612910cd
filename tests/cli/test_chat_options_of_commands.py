# SPDX-License-Identifier: Apache-2.0
"""The commands and the trainer: a template's options reach the model's input, and traced pairs keep them.

All were red before: `train` had no option, `rl` and `trace` did not read a row's columns, and pairs.jsonl lost them.
"""

import json

import pytest
import torch

pytest.importorskip("transformers")

from sspo_ext.cli.main import main
from sspo_ext.train.sspo_config import SSPOConfig
from sspo_ext.train.sspo_trainer import SSPOTrainer

TEMPLATE = (
    "{% if quiet %}hush {% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
USER = [{"role": "user", "content": "Q"}]
OWN = {"chat_template_kwargs": {"quiet": True}}


def parts():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<eos>", pad_token="<eos>", chat_template=TEMPLATE
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    for part in parts():
        part.save_pretrained(folder)
    return str(folder)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_train_gives_the_template_its_options(model, tmp_path, monkeypatch):
    from sspo_ext.train import preference_trainer

    seen = []
    init = preference_trainer.StepPreferenceTrainer.__init__

    def spy(self, model, args, train_set, *more, **options):
        seen.append(train_set)
        init(self, model, args, train_set, *more, **options)

    monkeypatch.setattr(preference_trainer.StepPreferenceTrainer, "__init__", spy)
    data = write(tmp_path / "pairs.jsonl", [{"prompt": USER, "chosen": "1", "rejected": "2"}])
    command = ["train", "--model", model, "--data", data, "--output-dir", str(tmp_path / "out"), "--max-steps", "1"]
    assert main([*command, "--chat-template-option", "quiet=true"]) == 0
    tokenizer = parts()[1]
    assert tokenizer.decode(seen[0][0]["chosen_input_ids"]) == "hush [user]Q<eos>\n[assistant]1<eos>"


@pytest.mark.parametrize("by_row", (True, False))
def test_traced_pairs_say_their_options(model, tmp_path, by_row):
    right = {"prompt": USER, "answer": "3", "response": "1\n#### 3", "reward": 1, **(OWN if by_row else {})}
    data = write(tmp_path / "chains.jsonl", [right, {**right, "response": "2\n#### 4", "reward": 0}])
    command = ["trace", "--model", model, "--data", data, "--output-dir", str(tmp_path / "out"), "--pairs", "chains"]
    given = [] if by_row else ["--chat-template-option", "quiet=true"]
    assert main([*command, "--min-gap", "0", *given]) == 0
    pairs = read(tmp_path / "out" / "pairs.jsonl")
    assert pairs and all(pair["chat_template_kwargs"] == {"quiet": True} for pair in pairs)


def test_the_trainer_reads_a_rows_options(tmp_path, monkeypatch):
    class Says:
        def complete(self, model, prompts, sampling, seeds):
            return [tokenizer("1\n2<eos>").input_ids for _ in prompts]

    model, tokenizer = parts()
    rows = [{"prompt": USER, "answer": "2", **OWN}, {"prompt": USER, "answer": "2"}]
    args = SSPOConfig(
        str(tmp_path), per_device_train_batch_size=2, num_generations=2, max_completion_length=4, probe="##",
        probe_turn=True, max_steps=1, report_to="none", disable_tqdm=True, use_cpu=True, backend="reference",
    )  # fmt: skip
    trainer = SSPOTrainer(
        model, args, lambda prompt, text, answer: 1.0, rows, processing_class=tokenizer, engine=Says()
    )
    rollouts = trainer.roll_out(rows, [(0,), (1,)])
    texts = [tokenizer.decode(rollout.prompt_ids) for rollout in rollouts]
    assert texts == ["hush [user]Q<eos>\n[assistant]", "[user]Q<eos>\n[assistant]"]
    asked, real = [], tokenizer.apply_chat_template
    monkeypatch.setattr(
        tokenizer, "apply_chat_template", lambda *a, **k: asked.append(k.get("quiet", False)) or real(*a, **k)
    )
    trainer.step_values(rollouts)
    assert set(asked) == {True, False}
