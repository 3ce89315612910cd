# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that lacks weights of its model, or has others, is an error. It used to train from random numbers."""

import json
import shutil

import pytest
import torch

pytest.importorskip("transformers")

from helpers.rl import make_model, make_tokenizer
from safetensors.torch import load_file, save_file

from sspo_ext.train import load_model

Q = "model.layers.0.self_attn.q_proj"


def saved(folder, edit=lambda weights, config: None, **options):
    """The folder of a model whose weights and config are edited."""
    make_model(**options).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    edit(weights, config)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "edit,message",
    [
        (lambda w, c: w.pop(f"{Q}.weight"), rf"lacks 1 weights \({Q}.weight\); they would be random"),
        (lambda w, c: w.pop("lm_head.weight"), r"lacks 1 weights \(lm_head.weight\)"),
        (lambda w, c: c.update(num_hidden_layers=3), r"lacks 9 weights \(model.layers.2.input_layernorm.weight, "),
        (lambda w, c: c.update(attention_bias=True), r"lacks 8 weights \(model.layers.0.self_attn.k_proj.bias, "),
        (lambda w, c: c.update(num_hidden_layers=1), r"has 9 weights \(model.layers.1.*no place"),
        (lambda w, c: w.update({f"{Q}.bias": torch.ones(16)}), rf"has 1 weights \({Q}.bias\)"),
        (lambda w, c: w.update({"model.norm.weight": torch.ones(8)}), r"norm.weight: .*\(16,\).* got (\(8,\)|another)"),
    ],
)  # fmt: skip
def test_what_is_missing_or_too_much_is_named(tmp_path, edit, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_model(saved(tmp_path / "model", edit))
    assert str(tmp_path / "model") in str(caught.value)


@pytest.mark.parametrize(
    "edit,options",
    [
        (lambda w, c: None, {}),
        (lambda w, c: None, {"tie_word_embeddings": True}),
        (lambda w, c: w.update({"v_head.summary.weight": torch.ones(1, 16)}), {}),
        (lambda w, c: w.update({"model.vision_tower.layers.0.weight": torch.ones(2)}), {}),
        (lambda w, c: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}), {}),
    ],
    ids=["whole", "tied", "value head", "vision tower", "old buffer"],
)
def test_no_false_alarms(tmp_path, edit, options):
    model, _ = load_model(saved(tmp_path / "model", edit, **options))
    assert all(p.isfinite().all() for p in model.parameters())


def test_buffers_that_are_not_saved_are_not_missed(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2, n_positions=16)).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    load_model(tmp_path)


def test_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    base = saved(tmp_path / "base")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    peft.get_peft_model(load_model(base)[0], lora).save_pretrained(tmp_path / "whole")
    load_model(tmp_path / "whole")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for edit, message in (
        (lambda w: w.pop(name), r"lacks 1 weights \(\S+layers.0.self_attn.q_proj.lora_A\S+\); they would be random"),
        (lambda w: w.pop("base_model.model.lm_head.weight"), "lacks weight 'base_model.model.lm_head.weight'"),
        (lambda w: w.update({name.replace("layers.0", "layers.7"): torch.ones(2, 16)}), "has 1 weights .*layers.7"),
        (lambda w: w.update({name: torch.ones(2, 8)}), "does not fit its base model: .*q_proj.lora_A"),
    ):
        folder = tmp_path / "edited"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", folder)
        weights = load_file(folder / "adapter_model.safetensors")
        edit(weights)
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"(?s){message}") as caught:
            load_model(folder)
        assert str(folder) in str(caught.value)
