# SPDX-License-Identifier: Apache-2.0
"""The trainer's two routes: the linear one by default, with the same loss and update as the logits route.

Mutations tried, and what caught each: `head.options` left out -> test_routes_agree[gemma2]; linear falls back and auto
raises -> test_linear_refuses_an_adapter_on_the_head; no self-check at the start -> test_auto_falls_back; router loss
times 0 -> test_router_loss_is_kept.
"""

import logging

import pytest
import torch
from helpers.preference import LOG_ROUNDING, config, make_features, make_model, parameters
from transformers import Gemma2Config, Gemma2ForCausalLM

from sspo_ext.data.collator import StepPreferenceCollator
from sspo_ext.hf.wrappers import UnsupportedHead
from sspo_ext.losses.pref import step_pref_loss
from sspo_ext.train.model_call import choose_route
from sspo_ext.train.preference_trainer import StepPreferenceTrainer


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
    assert runs["linear"][0] == pytest.approx(runs["logits"][0], rel=1e-5, abs=2 * LOG_ROUNDING)
    torch.testing.assert_close(runs["linear"][1], runs["logits"][1], rtol=1e-4, atol=1e-5)


def test_capped_logits_among_kept_tokens_take_the_logits_route():
    """The linear loss refuses them, which a training with top_p would find after its first rollouts."""
    device = torch.device("cpu")
    assert choose_route(make_gemma2(), "auto", device) == choose_route(make_gemma2(), "linear", device) == "linear"
    assert choose_route(make_gemma2(), "auto", device, narrowed=True) == "logits"
    with pytest.raises(UnsupportedHead, match="caps its logits, .* beside top_p or top_k; use route='logits'"):
        choose_route(make_gemma2(), "linear", device, narrowed=True)
    assert choose_route(make_model(), "linear", device, narrowed=True) == "linear"


def lora_on_the_head():
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")


def test_linear_refuses_an_adapter_on_the_head(tmp_path):
    pytest.importorskip("peft")
    with pytest.raises(UnsupportedHead, match="adapter on its output head.*route='logits'"):
        StepPreferenceTrainer(make_model(), config(tmp_path), make_features(), peft_config=lora_on_the_head())


def test_auto_falls_back(tmp_path, caplog):
    pytest.importorskip("peft")
    with caplog.at_level(logging.WARNING, "sspo_ext.train.preference_trainer"):
        trainer = StepPreferenceTrainer(
            make_model(), config(tmp_path, route="auto"), make_features(), peft_config=lora_on_the_head()
        )
    assert trainer.route == "logits" and "adapter on its output head" in caplog.text
    trainer.train()
    assert StepPreferenceTrainer(make_model(), config(tmp_path, route="auto"), make_features()).route == "linear"


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_virtual_tokens_are_not_the_texts(tmp_path, kernels):
    """Prompt tuning, whose logits begin with those of its virtual tokens: loss and gradient by hand."""
    peft = pytest.importorskip("peft")

    def make():
        prompts = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        torch.manual_seed(1)
        return peft.get_peft_model(make_model(), prompts)

    features, options = make_features(2), {"max_steps": 1, "learning_rate": 1.0, "reference_free": True}
    with pytest.raises(UnsupportedHead, match="prepends virtual tokens"):
        StepPreferenceTrainer(make(), config(tmp_path, **options), features)
    trainer = StepPreferenceTrainer(make(), config(tmp_path, route="auto", backend=kernels, **options), features)
    trainer.train()
    model, batch = make(), StepPreferenceCollator(0)(features)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    loss = step_pref_loss(logits[:, 3:], batch["layout"], batch["pairs"], backend="reference", beta=0.5).loss
    loss.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5, abs=LOG_ROUNDING)
    (before,) = [p for p in model.parameters() if p.requires_grad]
    (after,) = [p for p in trainer.model.parameters() if p.requires_grad]
    torch.testing.assert_close(after.detach(), before.detach() - before.grad, rtol=1e-4, atol=1e-6)
    # with a reference too, whose pass is another place that reads logits
    first = StepPreferenceTrainer(make(), config(tmp_path, route="logits"), make_features())
    assert first.train_dataset[0].keys() >= {"ref_chosen", "ref_rejected"}


class TestPlacement:
    """The check runs a model where Trainer has left it."""

    def test_a_model_in_parts_is_not_moved(self, tmp_path, monkeypatch):
        model, moved = make_model(), []
        model.hf_device_map = {"model": 0, "lm_head": 1}
        monkeypatch.setattr(model, "to", lambda *args, **kwargs: moved.append(args) or model)
        trainer = StepPreferenceTrainer(model, config(tmp_path), make_features())
        assert trainer.route == "linear" and not trainer.place_model_on_device and not moved

    def test_the_check_follows_the_weights(self):
        """A model that is to be sharded stays on the host, whatever the process's device."""
        assert choose_route(make_model(), "linear", torch.device("meta")) == "linear"

    def test_weights_that_are_elsewhere_are_not_checked(self, caplog):
        with caplog.at_level(logging.WARNING, "sspo_ext.train.model_call"):
            assert choose_route(make_model().to("meta"), "linear", torch.device("cpu")) == "linear"
        assert "not checked" in caplog.text

    @pytest.mark.parametrize("route", ["linear", "auto"])
    def test_the_first_process_decides(self, monkeypatch, route):
        """Under FSDP with cpu_ram_efficient_loading, the others' weights are memory that nobody has written to."""
        model = make_model()
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(float("nan"))
        monkeypatch.setattr("sspo_ext.train.model_call.broadcast_object_list", lambda mine: [None])
        assert choose_route(model, route, torch.device("cpu")) == "linear"
        firsts = [UnsupportedHead("the first one's")]
        monkeypatch.setattr("sspo_ext.train.model_call.broadcast_object_list", lambda mine: firsts)
        if route == "auto":
            assert choose_route(make_model(), route, torch.device("cpu")) == "logits"
        else:
            with pytest.raises(UnsupportedHead, match="the first one's"):
                choose_route(make_model(), route, torch.device("cpu"))

    def test_a_reference_pass_moves_the_model_and_puts_it_back(self, tmp_path, monkeypatch):
        """What Trainer leaves on the host until it is sharded: the batches of the pass are on the device."""
        model, moved = make_model(), []
        trainer = StepPreferenceTrainer(model, config(tmp_path, reference_free=True), make_features())
        trainer.place_model_on_device = False
        monkeypatch.setattr(type(trainer.args), "device", torch.device("meta"))
        monkeypatch.setattr(model, "to", lambda device: moved.append(device))
        with trainer._reference_model():
            assert moved == [torch.device("meta")]
        assert moved == [torch.device("meta"), torch.device("cpu")]


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
