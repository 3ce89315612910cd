# SPDX-License-Identifier: Apache-2.0
"""disable_dropout: policy and reference are the same function until the first update, whatever the rates."""

import json
import math

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from sspo_ext.train.dropout import disable_dropout
from sspo_ext.train.preference_config import StepPreferenceConfig
from sspo_ext.train.preference_trainer import StepPreferenceTrainer
from sspo_ext.train.sspo_config import SSPOConfig
from sspo_ext.train.sspo_trainer import SSPOTrainer

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2}

# What each of them does differently is where it keeps its rates.
FAMILIES = {
    "llama": SHAPE,  # an attribute of attention
    "gpt2": GPT2,  # dropout modules
    "opt": {**SHAPE, "ffn_dim": 32, "word_embed_proj_dim": 16},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},  # attributes, and F.dropout
    "falcon": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},  # the config, in forward
    "persimmon": SHAPE,  # the config, in forward
    "gpt_neox": SHAPE,
    "phi": SHAPE,
    "starcoder2": {**SHAPE, "num_key_value_heads": 1},
    "mixtral": {**SHAPE, "num_key_value_heads": 1, "num_local_experts": 2},
}

SPECIAL = {"vocab_size": 41, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}


def build(family, rate=0.5):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family], **SPECIAL)
    for name in list(vars(config)):
        if ("drop" in name or name.endswith("_pdrop")) and isinstance(getattr(config, name), (int, float)):
            setattr(config, name, rate)
    return AutoModelForCausalLM.from_config(config)


def logits(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 14)[None]).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_no_rate_is_overlooked(family):
    model, twin = build(family).train(), build(family).train()
    before = json.dumps(model.config.to_dict(), default=str)
    assert not torch.equal(logits(twin, 0), logits(twin, 1))
    disable_dropout(model)
    assert torch.equal(logits(model, 0), logits(model, 1))
    torch.testing.assert_close(logits(model, 0), logits(twin.eval(), 0))
    assert json.dumps(model.config.to_dict(), default=str) == before, "the saved model keeps its rates"


TARGETS = {"target_modules": ["q_proj", "v_proj"]}

ADAPTERS = {
    "lora": lambda peft: peft.LoraConfig(lora_dropout=0.5, **TARGETS),
    "dora": lambda peft: peft.LoraConfig(lora_dropout=0.5, use_dora=True, **TARGETS),
    "loha": lambda peft: peft.LoHaConfig(rank_dropout=0.5, module_dropout=0.5, **TARGETS),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_have_none(kind):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(build("llama", 0.0), ADAPTERS[kind](peft)).train()
    with torch.no_grad():  # a fresh adapter changes nothing
        for weight in model.parameters():
            weight += 0.2 * torch.randn(weight.shape) * weight.requires_grad
    assert len({logits(model, seed).sum().item() for seed in range(4)}) > 1
    config = model.config
    disable_dropout(model)
    trained = logits(model, 0)
    assert torch.equal(trained, logits(model, 1)) and model.config is config
    torch.testing.assert_close(trained, logits(model.eval(), 0))


def preference_trainer(folder, model, lora=None, **options):
    row = {"pairs": [[0, 0]], "weight": 1.0, "margin": 0.0, "source": "test:1"}
    for side, ids in (("chosen", [3, 4, 5, 6, 7, 8]), ("rejected", [3, 4, 9, 10])):
        row |= {f"{side}_input_ids": ids, f"{side}_labels": [-100, -100, *ids[2:]]}
        row[f"{side}_step_ids"] = [-1, -1, *(0 for _ in ids[2:])]
    shared = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    shared |= {"max_steps": 1, "learning_rate": 0.0, "dataloader_pin_memory": False}
    args = StepPreferenceConfig(str(folder), **shared, **options)
    return StepPreferenceTrainer(model, args, [row], peft_config=lora)


@pytest.mark.parametrize("with_adapter", [False, True])
def test_first_preference_loss_is_log_2(tmp_path, with_adapter):
    lora, rate = None, 0.5
    if with_adapter:
        peft = pytest.importorskip("peft")
        lora, rate = peft.LoraConfig(lora_dropout=0.5, target_modules=["c_attn"], task_type="CAUSAL_LM"), 0.5
    losses = []
    for folder, options in (("a", {}), ("b", {"disable_dropout": False})):
        trainer = preference_trainer(tmp_path / folder, build("gpt2", rate), lora, **options)
        losses.append(trainer.train().training_loss)  # of one update; transformers 4 rounds what it logs
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(losses[1] - math.log(2)) > 1e-4, "with disable_dropout=False the policy has dropout, as asked"


def letters():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "\n": 29} | {chr(97 + i): 3 + i for i in range(26)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.mark.parametrize("with_adapter", [False, True])
def test_first_ratio_is_1_and_first_kl_0(tmp_path, with_adapter):
    lora = None
    if with_adapter:
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(lora_dropout=0.5, target_modules=["c_attn"], task_type="CAUSAL_LM")
    args = SSPOConfig(
        str(tmp_path), per_device_train_batch_size=4, num_generations=2, max_completion_length=6, max_steps=2,
        combine="outcome", loss_type="ppo", num_iterations=2, beta=0.1, learning_rate=0.0, use_cpu=True,
        report_to="none", disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    rows = [{"prompt": "abc", "answer": "x"}, {"prompt": "bcd", "answer": "y"}]
    ratios = []

    class Watched(SSPOTrainer):
        def policy_loss(self, model, batch, num_items):
            with torch.no_grad():
                now = self.step_logps(model, batch).tokens
            ratios.append([(now - batch[name]).abs().max().item() for name in ("old", "ref")])
            return super().policy_loss(model, batch, num_items)

    def reward(prompt, completion, answer):
        return len(completion) / 6

    trainer = Watched(build("gpt2"), args, reward, rows, processing_class=letters(), peft_config=lora)
    trainer.train()
    assert len(ratios) == 2 and max(max(pair) for pair in ratios) < 1e-5


@pytest.mark.parametrize("config", [StepPreferenceConfig, SSPOConfig])
def test_the_option_has_trls_name(config, tmp_path):
    assert config(str(tmp_path), use_cpu=True).disable_dropout is True
    (parsed,) = transformers.HfArgumentParser(config).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", "--disable_dropout", "False"]
    )
    assert parsed.disable_dropout is False
