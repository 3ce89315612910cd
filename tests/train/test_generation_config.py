# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's generation config decides what ends a completion, and nothing else of what is drawn."""

import copy

import pytest

pytest.importorskip("transformers")

from helpers.rl import make_model, make_tokenizer, make_trainer

from sspo_ext.train.rollout import CompactEngine, GenerateEngine, end_tokens, generation_config_of
from sspo_ext.train.sampling import Sampling

PROMPTS = [[5, 6, 7], [8, 8, 8, 8], [9, 10, 11, 12, 13]]
SEEDS = [(0, i) for i in range(len(PROMPTS))]
LEAKS = {
    "exponential_decay_length_penalty": (1, 3.0),
    "guidance_scale": 3.0,
    "encoder_repetition_penalty": 2.5,
    "encoder_no_repeat_ngram_size": 1,
    "max_time": 1e-9,
    "repetition_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "min_length": 12,
    "min_new_tokens": 9,
    "bad_words_ids": [[5], [6], [7], [8], [9], [10]],
    "suppress_tokens": list(range(2, 20)),
    "forced_eos_token_id": 4,
    "sequence_bias": [[[7], 50.0]],
    "max_length": 6,
    "num_return_sequences": 2,
    "return_dict_in_generate": True,
    "output_scores": True,
    "num_beams": 2,
    "renormalize_logits": True,
    "remove_invalid_values": True,
    "prompt_lookup_num_tokens": 2,
    "stop_strings": ["a"],
    "watermarking_config": {"greenlist_ratio": 0.1, "bias": 9.0},
    "eos_token_id": 30,
}


@pytest.fixture(scope="module")
def model():
    return make_model(scale=2.0).eval()


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("setting", LEAKS)
def test_nothing_leaks_into_what_is_drawn(model, setting, temperature):
    sampling = Sampling(10, (1, 4), temperature)
    expected = CompactEngine(0).complete(model, PROMPTS, sampling, SEEDS)
    before = copy.deepcopy(model.generation_config)
    setattr(model.generation_config, setting, LEAKS[setting])
    given = model.generation_config
    try:
        assert GenerateEngine(0).complete(model, PROMPTS, sampling, SEEDS) == expected
        assert model.generation_config is given and getattr(given, setting) == LEAKS[setting], "kept, to be saved"
    finally:
        model.generation_config = before


def test_with_an_adapter(model):
    peft = pytest.importorskip("peft")
    sampling = Sampling(10, (1, 4))
    adapted = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    ).eval()
    expected = CompactEngine(0).complete(adapted, PROMPTS, sampling, SEEDS)
    adapted.get_base_model().generation_config.encoder_repetition_penalty = 2.5
    adapted.get_base_model().generation_config.no_repeat_ngram_size = 1
    assert GenerateEngine(0).complete(adapted, PROMPTS, sampling, SEEDS) == expected


def test_the_config_is_given_back_after_an_error(model):
    given = model.generation_config
    with pytest.raises(RuntimeError, match="stop"), generation_config_of(model, object()):
        assert model.generation_config is not given
        raise RuntimeError("stop")
    assert model.generation_config is given


def test_evaluation_is_greedy_whatever_the_checkpoint_says(tmp_path):
    rows, found = [{"prompt": "1+1=\n", "answer": "2"}], []
    for settings in ({}, {"encoder_repetition_penalty": 2.5, "exponential_decay_length_penalty": (1, 3.0)}):
        model = make_model(scale=2.0)
        for name, value in settings.items():
            setattr(model.generation_config, name, value)
        trainer = make_trainer(tmp_path, model, eval_dataset=rows)
        found += [r.completion_ids for r in trainer.roll_out(rows, [(0,)], temperature=0.0)]
    assert found[0] == found[1]


def test_the_ends_of_the_checkpoint_count(model):
    model = copy.deepcopy(model)
    model.generation_config.eos_token_id = [7, 4]
    assert end_tokens(model, make_tokenizer()) == (7, 4, 1)
