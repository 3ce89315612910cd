# SPDX-License-Identifier: Apache-2.0
"""Packed batches through FlashAttention's interface: a stand-in in its place sees what it is given and computes it.

flash-attn needs a GPU. transformers reaches it by name, so the stand-in is put where transformers keeps the functions;
everything between the trainer's batch and those calls is the real thing.

Mutations, and what caught each: boundaries not handed on, FlashAttention not recognised -> test_packed_training_
through_flash_attention; positions not reset -> that and test_boundaries_found_from_position_ids_alone; longest sequence
one short, a mask of ones -> that and test_collator_gives_the_boundaries.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.preference import LOG_ROUNDING, config, logs, make_features, make_model, parameters
from transformers import modeling_flash_attention_utils as flash_utils

from sspo_ext.data.collator import StepPreferenceCollator
from sspo_ext.train.preference_trainer import StepPreferenceTrainer

if not hasattr(flash_utils, "_lazy_define_process_function"):
    pytest.skip("transformers keeps its flash functions elsewhere", allow_module_level=True)


class StandIn:
    """flash_attn_func and flash_attn_varlen_func by torch's own attention, with a record of every call."""

    def __init__(self):
        self.varlen, self.plain = [], []

    def attend(self, q, k, v, softmax_scale):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (total, heads, D) -> (1, heads, total, D)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=True)
        return out[0].transpose(0, 1)

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False,
    ):  # fmt: skip
        self.varlen.append((cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, tuple(q.shape)))
        edges = cu_seqlens_q.tolist()
        parts = [self.attend(q[a:b], k[a:b], v[a:b], softmax_scale) for a, b in zip(edges[:-1], edges[1:], strict=True)]
        return torch.cat(parts)

    def flash_attn_func(self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        self.plain.append((tuple(q.shape), causal))
        return torch.stack([self.attend(*row, softmax_scale) for row in zip(q, k, v, strict=True)])


@pytest.fixture
def flash(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setattr(flash_utils, "_loaded_implementation", "flash_attention_2", raising=False)
    functions = {
        "_flash_fn": stand_in.flash_attn_func,
        "_flash_varlen_fn": stand_in.flash_attn_varlen_func,
        "_flash_with_kvcache_fn": None,
        "_pad_fn": flash_utils._pad_input,
        "_unpad_fn": flash_utils._unpad_input,
        "_process_flash_kwargs_fn": flash_utils._lazy_define_process_function(stand_in.flash_attn_varlen_func),
        "_process_with_kvcache_kwargs_fn": dict,
    }
    for name, function in functions.items():
        monkeypatch.setattr(flash_utils, name, function, raising=False)
    return stand_in


def flash_model():
    model = make_model()
    model.config._attn_implementation = "flash_attention_2"  # by the front door transformers would look for a GPU
    return model


def test_collator_gives_the_boundaries():
    features = make_features(3)
    batch = StepPreferenceCollator(0, packed=True, flash_attention=True)(features)
    lengths = [len(f[f"{side}_input_ids"]) for side in ("chosen", "rejected") for f in features]
    assert batch["cu_seq_lens_q"].diff().tolist() == batch["cu_seq_lens_k"].diff().tolist() == lengths
    assert batch["cu_seq_lens_q"].dtype == torch.int32 and batch["cu_seq_lens_q"][0] == 0
    assert batch["max_length_q"] == batch["max_length_k"] == max(lengths)
    assert "attention_mask" not in batch
    assert "cu_seq_lens_q" not in StepPreferenceCollator(0, flash_attention=True)(features), "padded: by the mask"
    assert "cu_seq_lens_q" not in StepPreferenceCollator(0, packed=True)(features), "other attention: by position_ids"


@pytest.mark.parametrize("route", ["linear", "logits"])
def test_packed_training_through_flash_attention(tmp_path, flash, route):
    """Same losses and weights as a padded run with torch's own attention; what FlashAttention is given in between."""
    features = make_features(8)
    options = {"max_steps": 2, "route": route, "backend": "reference"}
    padded = StepPreferenceTrainer(make_model(), config(tmp_path / "a", **options), features)
    padded.train()
    assert not flash.varlen and not flash.plain

    packed = StepPreferenceTrainer(flash_model(), config(tmp_path / "b", packing=True, **options), features)
    flash.varlen.clear(), flash.plain.clear()
    seen = []
    packed.model.model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    packed.train()
    assert logs(packed) == pytest.approx(logs(padded), rel=1e-5, abs=2 * LOG_ROUNDING)
    torch.testing.assert_close(parameters(packed), parameters(padded), rtol=0, atol=1e-5)

    layers = packed.model.config.num_hidden_layers
    assert not flash.plain and len(flash.varlen) == len(seen) * layers
    for inputs, call in zip([kwargs for kwargs in seen for _ in range(layers)], flash.varlen, strict=True):
        cu_q, cu_k, longest_q, longest_k, causal, shape = call
        assert inputs.get("attention_mask") is None and inputs.get("use_cache") is False
        starts = (inputs["position_ids"][0] == 0).nonzero()[:, 0].tolist()
        assert cu_q.tolist() == cu_k.tolist() == [*starts, shape[0]] and cu_q.dtype == torch.int32
        assert causal and longest_q == longest_k == int(cu_q.diff().max())
        assert isinstance(longest_q, int), "a tensor here is a wait for the device in every layer"


def test_boundaries_found_from_position_ids_alone(flash):
    """A collator that does not know of FlashAttention: transformers finds the same boundaries."""
    features, model = make_features(3), flash_model()
    given = StepPreferenceCollator(0, packed=True, flash_attention=True)(features)
    kept = {k: given[k] for k in ("input_ids", "position_ids")}
    everything = kept | {k: given[k] for k in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")}
    with torch.no_grad():
        found, told = (model(**inputs, use_cache=False).logits for inputs in (kept, everything))
    torch.testing.assert_close(found, told)
    assert flash.varlen[0][0].tolist() == flash.varlen[-1][0].tolist()
