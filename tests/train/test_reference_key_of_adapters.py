# SPDX-License-Identifier: Apache-2.0
"""The reference cache's key: another adapter, another scale or a switched-off adapter is another reference."""

import copy
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sspo_ext.train.preference_config import StepPreferenceConfig
from sspo_ext.train.preference_trainer import StepPreferenceTrainer
from sspo_ext.train.reference_cache import reference_key

peft = pytest.importorskip("peft")


def make_model():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=41, pad_token_id=0, eos_token_id=1, initializer_range=0.3, **shape))


def lora(alpha=4, **options):
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **options}
    return peft.LoraConfig(lora_alpha=alpha, task_type="CAUSAL_LM", **options)


def adapted(config=None):
    """Two adapters, and the same weights whatever the config's scale."""
    model = peft.get_peft_model(make_model(), config or lora())
    model.add_adapter("other", lora())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if "lora" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def other_active(model):
    model.set_adapter("other")


def scaled(model):
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)


CHANGES = {
    "active adapter": (None, other_active),
    "alpha": (lora(alpha=8), None),
    "alpha of one module": (lora(alpha_pattern={"v_proj": 16}), None),
    "rslora": (lora(use_rslora=True), None),
    "scale set later": (None, scaled),
    "switched off": (None, lambda model: model.disable_adapter_layers()),
}


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 12)[None]).logits


@pytest.mark.parametrize("change", CHANGES)
def test_another_function_has_another_key(change):
    config, act = CHANGES[change]
    one, other = adapted(), adapted(config)
    if act is not None:
        act(other)
    weights = one.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in other.state_dict().items())
    assert (logits(one) - logits(other)).abs().max() > 1e-3
    assert reference_key(one, {}, adapters=True) != reference_key(other, {}, adapters=True)
    assert reference_key(one, {}) == reference_key(other, {}), "the model under the adapters is the same"


def test_the_same_function_has_the_same_key(tmp_path):
    """Saved and loaded, trainable or not; a key must not depend on the order of a set."""
    model = peft.get_peft_model(make_model(), lora())
    model.save_pretrained(tmp_path)
    loaded = [peft.PeftModel.from_pretrained(make_model(), tmp_path, is_trainable=way) for way in (False, True)]
    keys = {reference_key(m, {}, adapters=True) for m in (model, copy.deepcopy(model), *loaded)}
    assert len(keys) == 1


def test_adapters_without_a_peft_model():
    keys = set()
    for alpha in (4, 8):
        torch.manual_seed(0)
        keys.add(reference_key(peft.inject_adapter_in_model(lora(alpha), make_model()), {}, adapters=True))
    assert len(keys) == 2


def test_a_model_without_adapters_keeps_its_key():
    model = make_model()
    assert reference_key(model, {}, adapters=True) == reference_key(model, {})


@pytest.mark.parametrize("change", CHANGES)
def test_runs_that_share_a_cache_have_each_their_reference(tmp_path, change):
    config, act = CHANGES[change]
    row = {"pairs": [[0, 0]], "weight": 1.0, "margin": 0.0, "source": "test:1"}
    for side, ids in (("chosen", [3, 4, 5, 6, 7, 8]), ("rejected", [3, 4, 9, 10])):
        row |= {f"{side}_input_ids": ids, f"{side}_labels": [-100, -100, *ids[2:]]}
        row[f"{side}_step_ids"] = [-1, -1, *(0 for _ in ids[2:])]
    args = StepPreferenceConfig(
        str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, dataloader_pin_memory=False
    )
    losses = []
    for model in (adapted(), adapted(config)):
        if len(losses) and act is not None:
            act(model)
        losses.append(StepPreferenceTrainer(model, args, None, [row]).evaluate()["eval_loss"])
    assert losses == pytest.approx([math.log(2)] * 2, abs=1e-6)
