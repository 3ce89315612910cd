# SPDX-License-Identifier: Apache-2.0
"""A cache under both of its names. All tests make an error of transformers' warning of the old one (pyproject.toml).

Mutations that turned a test red: one of the names alone, in `cache_input` and in `cache_of`; the old name asked first.
"""

import types

import pytest
import torch
from helpers.hf import IDS, llama
from torch import nn

from sspo_ext.hf.cache import cache_input, cache_of
from sspo_ext.hf.forward import forward_logits_at

peft = pytest.importorskip("peft")


class Older(nn.Module):
    def forward(self, input_ids, past_key_values=None):
        """As in transformers before 5.24, and in models of remote code."""


class Newer(nn.Module):
    def forward(self, input_ids, cache=None, **kwargs):
        """As in transformers 5.24."""


class NewerOutputs:
    cache = "the cache"

    @property
    def past_key_values(self):
        raise AssertionError("the old name was read, and newer outputs warn of that")


def test_the_name_is_the_forwards():
    assert cache_input(Older(), 1) == {"past_key_values": 1}
    assert cache_input(Newer(), 1) == cache_input(nn.DataParallel(Newer()), 1) == {"cache": 1}


def test_the_cache_among_outputs():
    assert cache_of(NewerOutputs()) == "the cache"
    assert cache_of(types.SimpleNamespace(logits=0, past_key_values="kept")) == "kept"
    assert cache_of((0,)) is None


@pytest.mark.parametrize("adapter", [False, True], ids=["bare", "lora"])
def test_a_model_goes_on_from_its_cache(adapter):
    model = llama()
    if adapter:
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model, last = model.eval(), torch.tensor([0])
    with torch.no_grad():
        expected = model(IDS[:1]).logits[0, -1:]
        _, outputs = forward_logits_at(model, last, input_ids=IDS[:1, :-1], use_cache=True)
        inputs = {"input_ids": IDS[:1, -1:], **cache_input(model, cache_of(outputs))}
        got, outputs = forward_logits_at(model, last, use_cache=True, **inputs)
    torch.testing.assert_close(got, expected)
    assert cache_of(outputs).get_seq_length() == IDS.shape[1]
