# SPDX-License-Identifier: Apache-2.0
"""The weights that a rollout engine is given: names and values of the checkpoint, whatever PEFT calls them meanwhile.

What was broken -> what went red: adapters known by "lora_" in their names -> test_names_and_values[tokens, ia3, vera,
oft, norms] and test_what_cannot_be_merged.
"""

import copy

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
import peft
from helpers.rl import make_model

from sspo_ext.train.policy_weights import policy_weights

pytestmark = pytest.mark.filterwarnings("ignore")
TASK = {"task_type": "CAUSAL_LM"}
KINDS = {
    "lora": lambda: peft.LoraConfig(target_modules="all-linear", modules_to_save=["embed_tokens"], **TASK),
    "dora": lambda: peft.LoraConfig(target_modules="all-linear", use_dora=True, **TASK),
    "tokens": lambda: peft.LoraConfig(target_modules="all-linear", trainable_token_indices=[1], **TASK),
    "ia3": lambda: peft.IA3Config(**TASK),
    "vera": lambda: peft.VeraConfig(target_modules=["q_proj"], **TASK),
    "oft": lambda: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4, r=0, **TASK),
    "norms": lambda: peft.LNTuningConfig(**TASK),
}


def trained(model):
    """Every trainable weight a little off its start, at which many adapters do nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=generator)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_values(kind):
    model = trained(peft.get_peft_model(make_model(), KINDS[kind]()))
    expected = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    assert expected.keys() == dict(make_model().named_parameters()).keys()
    model.merge_adapter()
    found = dict(policy_weights(model))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight.data, msg=name)
    assert not all(torch.equal(found[name], weight) for name, weight in make_model().named_parameters())


def test_the_active_adapters_copy_is_taken():
    model = peft.get_peft_model(make_model(), KINDS["lora"](), adapter_name="first")
    model.add_adapter("second", KINDS["lora"]())
    trained(model)
    model.set_adapter("second")
    weight = model.get_base_model().model.embed_tokens.modules_to_save["second"].weight
    assert torch.equal(dict(policy_weights(model))["model.embed_tokens.weight"], weight)


def test_checkpoint_wrappers_are_not_in_the_names():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = make_model()
    names = [name for name, _ in model.named_parameters()]
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    assert [name for name, _ in policy_weights(model)] == names


def test_tied_weights_come_once():
    model = make_model(tie_word_embeddings=True)
    names = [name for name, _ in policy_weights(model)]
    assert names == [name for name, _ in model.named_parameters()] and "lm_head.weight" not in names


@pytest.mark.parametrize("kind", ("PROMPT_TUNING", "PREFIX_TUNING", "LORA"))
def test_what_cannot_be_merged(kind):
    model = make_model()
    if kind == "LORA":
        try:
            model.add_adapter(KINDS["dora"]())  # transformers' own, which cannot merge
        except ValueError as error:  # this transformers asks for a newer peft
            if "version of PEFT" not in str(error):
                raise
            pytest.skip(str(error))
    else:
        config = {"PROMPT_TUNING": peft.PromptTuningConfig, "PREFIX_TUNING": peft.PrefixTuningConfig}[kind]
        model = peft.get_peft_model(model, config(num_virtual_tokens=2, **TASK))
    with pytest.raises(
        ValueError, match=f"rollout_engine: 'vllm' takes .* {kind} cannot be merged here; use 'generate'"
    ):
        policy_weights(model)
