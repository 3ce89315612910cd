"""The trainer's two routes: the linear one by default, with the same loss and update as the logits route.

Mutations tried, and what caught each: `head.options` left out -> test_routes_agree[gemma2]; linear falls back and auto
raises -> test_linear_refuses_an_adapter_on_the_head; no self-check at the start -> test_auto_falls_back; router loss
times 0 -> test_router_loss_is_kept.
"""

import logging

import pytest
import torch
from test_trainer import config, make_features, make_model, parameters
from transformers import Gemma2Config, Gemma2ForCausalLM

from sspo_ext.hf import UnsupportedHead
from sspo_ext.train.trainer import StepPreferenceTrainer


def make_gemma2():
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, max_position_embeddings=64, final_logit_softcapping=2.0, pad_token_id=0,
        )
    )  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p *= 4
    return model


@pytest.mark.parametrize("make", [make_model, make_gemma2], ids=["llama", "gemma2"])
def test_routes_agree(tmp_path, make):
    """Loss, metrics and weights after four updates; tied (gemma2) and untied (llama) heads."""
    runs = {}
    for route in ("linear", "logits"):
        options = {"route": route, "backend": "auto", "loss_type": "ipo", "learning_rate": 0.01}
        trainer = StepPreferenceTrainer(make(), config(tmp_path / route, **options), make_features())
        assert trainer.route == route
        trainer.train()
        runs[route] = ([r["loss"] for r in trainer.state.log_history if "loss" in r], parameters(trainer))
    assert runs["linear"][0] == pytest.approx(runs["logits"][0], rel=1e-5)
    torch.testing.assert_close(runs["linear"][1], runs["logits"][1], rtol=1e-4, atol=1e-5)


def lora_on_the_head():
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")


def test_linear_refuses_an_adapter_on_the_head(tmp_path):
    pytest.importorskip("peft")
    with pytest.raises(UnsupportedHead, match="adapter on its output head.*route='logits'"):
        StepPreferenceTrainer(make_model(), config(tmp_path), make_features(), peft_config=lora_on_the_head())


def test_auto_falls_back(tmp_path, caplog):
    pytest.importorskip("peft")
    with caplog.at_level(logging.WARNING, "sspo_ext.train.trainer"):
        trainer = StepPreferenceTrainer(
            make_model(), config(tmp_path, route="auto"), make_features(), peft_config=lora_on_the_head()
        )
    assert trainer.route == "logits" and "adapter on its output head" in caplog.text
    trainer.train()
    assert StepPreferenceTrainer(make_model(), config(tmp_path, route="auto"), make_features()).route == "linear"


def test_unknown_route(tmp_path):
    with pytest.raises(ValueError, match="route: expected one of 'linear', 'logits', 'auto', got 'lin'"):
        StepPreferenceTrainer(make_model(), config(tmp_path, route="lin"), make_features())


@pytest.mark.parametrize("route", ["linear", "logits"])
def test_router_loss_is_kept(tmp_path, route):
    """Gradients of the router with and without the balance loss, which hidden states alone do not carry."""
    from transformers import MixtralConfig, MixtralForCausalLM

    def update(coefficient):
        torch.manual_seed(0)
        model = MixtralForCausalLM(
            MixtralConfig(
                vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, num_local_experts=4, output_router_logits=True, pad_token_id=0,
                router_aux_loss_coef=coefficient, max_position_embeddings=64,
            )
        )  # fmt: skip
        options = {"route": route, "max_steps": 1, "learning_rate": 1.0, "gradient_accumulation_steps": 2}
        trainer = StepPreferenceTrainer(model, config(tmp_path / str(coefficient), **options), make_features())
        trainer.train()
        return torch.cat([p.detach().reshape(-1) for name, p in model.named_parameters() if "gate" in name])

    assert (update(0.0) - update(1.0)).abs().max() > 1e-4
