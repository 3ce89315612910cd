# SPDX-License-Identifier: Apache-2.0
"""The compact engine's parts: prompts read once, a cache with room, packed weights, a draw by blocks.

Broken on purpose: the engine that reads every row's prompt; `closed_up` without the rows from behind; a room that is
written one column too far or kept after another method has replaced the tensor; rows moved without their values; a draw
that forgets what lies before its block; packed weights that stay; a bias that is left out; a fallback never used.
"""

import copy
import inspect
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from helpers.rl import make_model, make_tokenizer
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from sspo_ext.train.compact_engine import CompactEngine, closed_up
from sspo_ext.train.drawing import draw
from sspo_ext.train.packed_weights import packed_weights
from sspo_ext.train.rollout import GenerateEngine, make_engine
from sspo_ext.train.roomy_cache import RoomyCache, RoomyLayer
from sspo_ext.train.sampling import Sampling

A, B, C = [5, 6, 7], [8], [9, 10, 11, 12, 13]


# ---- prompts


@pytest.mark.parametrize("rows", [None, 3])
def test_a_prompt_is_read_once_for_all_of_its_rows(rows):
    model, read = make_model(scale=2.0).eval(), []
    prompts = [A, A, C, A, B, B, C, A]
    seeds, sampling = [(3, i) for i in range(len(prompts))], Sampling(12, (1, 4))
    expected = GenerateEngine(0, rows).complete(model, prompts, sampling, seeds)
    model.register_forward_pre_hook(lambda m, args, kwargs: read.append(kwargs["input_ids"].shape), with_kwargs=True)
    assert CompactEngine(0, rows).complete(model, prompts, sampling, seeds) == expected
    assert len({len(ids) for ids in expected}) > 2
    assert [tuple(shape) for shape in read if shape[1] > 1] == ([(3, 5)] if rows is None else [(2, 5), (2, 3), (2, 5)])


def test_under_autocast():
    """The cache holds what the attention computes in, and the completions are those of `generate`."""
    model = make_model(scale=2.0).eval()
    prompts, seeds = [A, B, A, C], [(5, i) for i in range(4)]
    with torch.autocast("cpu", torch.bfloat16):
        found = CompactEngine(0).complete(model, prompts, Sampling(12, (1,)), seeds)
        assert found == GenerateEngine(0).complete(model, prompts, Sampling(12, (1,)), seeds)
        layer = RoomyLayer()
        keys, values = layer.update(torch.rand(1, 1, 2, 4), torch.rand(1, 1, 2, 4))
    assert keys.dtype == values.dtype == torch.bfloat16


class Bare(LlamaForCausalLM):
    """A model whose forward finds the positions by itself, as with ALiBi, and gives all logits."""

    def forward(self, input_ids, attention_mask, past_key_values, use_cache):  # pyright: ignore
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        name = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
        given: Any = {"attention_mask": attention_mask, "position_ids": positions, name: past_key_values}
        return super().forward(input_ids, use_cache=use_cache, **given)


def test_a_model_that_takes_no_positions():
    model = make_model(scale=2.0).eval()
    bare = Bare(model.config).eval()
    bare.load_state_dict(model.state_dict())
    prompts, seeds, sampling = [A, B, C], [(i,) for i in range(3)], Sampling(8, (1,))
    expected = GenerateEngine(0).complete(model, prompts, sampling, seeds)
    assert CompactEngine(0).complete(bare, prompts, sampling, seeds) == expected


def test_layers_of_other_types_are_refused():
    """LFM2: layers with convolutions need a cache of their own, which is not made by the first forward."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    torch.manual_seed(0)
    sizes = dict(vocab_size=30, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1)
    options = sizes | dict(num_hidden_layers=2, layer_types=["full_attention", "conv"], pad_token_id=0, eos_token_id=1)
    model = transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**options)).eval()
    prompts, seeds, sampling = [A, B], [(0,), (1,)], Sampling(4, (1,))
    with pytest.raises(ValueError, match="rollout_engine: 'compact' needs.*Lfm2.*layers of the types conv; use"):
        CompactEngine(0).complete(model, prompts, sampling, seeds)
    found = make_engine("auto", make_tokenizer()).complete(model, prompts, sampling, seeds)
    assert found == GenerateEngine(0).complete(model, prompts, sampling, seeds)


def test_auto_takes_generate_for_a_model_that_forgets():
    mamba = MambaForCausalLM(MambaConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, state_size=4)).eval()
    auto, prompts, seeds = make_engine("auto", make_tokenizer()), [A, B], [(0,), (1,)]
    sampling = Sampling(4, (1,))
    assert auto.complete(mamba, prompts, sampling, seeds) == GenerateEngine(0).complete(mamba, prompts, sampling, seeds)
    with pytest.raises(ValueError, match="seeds: expected one for each of 2 prompts, got 1"):
        auto.complete(make_model().eval(), prompts, sampling, seeds[:1])
    with pytest.raises(ValueError, match="rollout_engine: 'compact' needs a model that keeps its context"):
        make_engine("compact", make_tokenizer()).complete(mamba, prompts, sampling, seeds)


# ---- the cache


def test_rows_close_up():
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 7, 40):
        for share in (0.0, 0.2, 0.9, 1.0):
            going = torch.rand(size, generator=generator) < share
            places = closed_up(going)
            assert sorted(places.tolist()) == going.nonzero()[:, 0].tolist()
            stay = [i for i in range(len(places)) if going[i]]
            assert places[stay].tolist() == stay  # all others come from behind


def test_a_cache_with_room_holds_what_a_dynamic_cache_holds():
    generator = torch.Generator().manual_seed(0)
    roomy: Any = RoomyCache()
    plain: Any = DynamicCache()
    in_place = 0
    rows = 3
    for step in range(150):
        new = 5 if step == 0 else 1
        states = [torch.rand(rows, 2, new, size, generator=generator) for size in (4, 3)]
        before = roomy.layers[0].keys.data_ptr() if step else 0
        for found, expected in zip(roomy.update(*states, 0), plain.update(*states, 0), strict=True):
            assert torch.equal(found, expected)
        in_place += before == roomy.layers[0].keys.data_ptr()
        if step in (0, 40, 90, 120):
            chosen = {0: [0, 0, 1, 2, 2, 2], 40: [0, 5, 2, 3], 90: [3, 1], 120: [0]}[step]
            for cache in (roomy, plain):
                cache.batch_select_indices(torch.tensor(chosen))
            rows = len(chosen)
        if step == 60:  # another method puts a tensor of its own there
            for cache in (roomy, plain):
                cache.reorder_cache(torch.tensor([2, 1, 0, 3]))
    assert roomy.get_seq_length() == 154
    assert in_place > 140


# ---- draws


@pytest.mark.parametrize("size", [97, 4096, 4097, 5000, 49152])
def test_draws_follow_the_running_sum(size):
    """Against the running sum in float64, at uniform numbers that are not within rounding of one of its values."""
    generator = torch.Generator().manual_seed(size)
    p = (torch.randn(64, size, generator=generator) * 3).softmax(-1)
    p[:, ::3] = 0  # as top_k leaves it; no longer adds up to 1
    p[:2] = 0
    p[0, -1] = p[1, 0] = 0.5  # one token alone
    uniform = torch.rand(64, 1, generator=generator)
    uniform[2:6, 0] = torch.tensor([0.0, 1 - 2**-24, 2**-24, 0.5])
    exact = p.double().cumsum(1)
    target = uniform * exact[:, -1:]
    expected = torch.searchsorted(exact, target, right=True)
    drawn = draw(p, uniform)[:, None]
    assert drawn.dtype == torch.int64 and (p.gather(1, drawn) > 0).all()
    clear = ((exact - target).abs().amin(1) > 2e-6).tolist()
    assert sum(clear) > 20
    for row, is_clear in enumerate(clear):
        assert drawn[row] == expected[row] or not is_clear, row


def test_a_draw_stays_in_its_block():
    """The sum of a block is rounded; the greatest uniform number must not lead behind its last token."""
    p = torch.zeros(2000, 5000)
    p[:, :512] = torch.rand(2000, 512, generator=torch.Generator().manual_seed(0))
    drawn = draw(p, torch.full((2000, 1), 1 - 2**-24))
    assert (p.gather(1, drawn[:, None]) > 0).all()


def test_draws_have_the_distribution():
    """A large vocabulary, 20,000 draws: the counts of blocks' ends and beginnings as of all others."""
    size, n = 5000, 20_000
    p = torch.zeros(size)
    some = torch.tensor([0, 511, 512, 513, 1023, 1024, 4095, 4096, 4607, 4608, 4999])
    p[some] = torch.arange(1.0, 12.0)
    uniform = torch.from_numpy(np.random.default_rng(0).random((n, 1))).float()
    counts = torch.bincount(draw(p.expand(n, size).contiguous(), uniform), minlength=size).double()
    share = p.double() / p.sum()
    assert ((counts / n - share).abs() < 4.5 * (share * (1 - share) / n).sqrt() + 1e-12).all()


# ---- packed weights


class Mine(torch.nn.Linear):
    """A linear layer of another kind."""


def layers() -> Any:
    torch.manual_seed(0)
    linear = torch.nn.Linear
    return torch.nn.ModuleDict({
        "whole": linear(300, 260), "bare": linear(260, 280, bias=False), "small": linear(280, 16),
        "mine": Mine(300, 300),
    })  # fmt: skip


def run(model, x):
    return model["small"](model["bare"](model["whole"](model["mine"](x))).relu())


@pytest.mark.parametrize("autocast", [False, True])
def test_packed_weights_compute_the_same(autocast):
    model, x = layers(), torch.randn(5, 2, 300)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        exact = run(copy.deepcopy(model).double(), x.double()) if not autocast else run(model, x)
        plain = run(model, x)
        with packed_weights(model, 10):
            inside = [name for name, layer in model.items() if "forward" in vars(layer)]
            found = run(model, x)
    packs = not autocast or torch.ops.mkldnn._is_mkldnn_bf16_supported()  # else none, as the next test says
    assert inside == (["whole", "bare"] if packs else [])
    assert not any("forward" in vars(layer) for layer in model.values())
    assert found.dtype == plain.dtype
    error = (found - exact).abs().max()
    assert error <= (0.02 if autocast else 2 * (plain - exact).abs().max() + 1e-6)
    assert exact.abs().max() > 0.2


def test_a_processor_without_bfloat16_packs_none(monkeypatch):
    """oneDNN refuses to lay out such weights there, with an error of its own."""
    model, x = layers(), torch.randn(5, 2, 300)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), packed_weights(model, 10):
        assert not any("forward" in vars(layer) for name, layer in model.items() if name != "mine")
        run(model, x)
    with packed_weights(model, 10):
        assert any("forward" in vars(layer) for name, layer in model.items() if name != "mine")


def test_packed_weights_are_taken_off_and_made_anew():
    model, x = layers(), torch.randn(3, 300)
    with pytest.raises(RuntimeError, match="inside"), packed_weights(model, 3):
        raise RuntimeError("inside")
    assert not any("forward" in vars(layer) for layer in model.values())
    with torch.no_grad():
        model["whole"].weight *= -1  # an update
        expected = run(model, x)
        with packed_weights(model, 3):
            assert torch.allclose(run(model, x), expected, atol=1e-5)
    run(model, x).sum().backward()
    assert model["whole"].weight.grad is not None


def test_completions_with_packed_weights():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=256, n_layer=1, n_head=4, n_positions=64)).eval()
    prompts, seeds, sampling = [A, A, C], [(i,) for i in range(3)], Sampling(16, (1,))
    used = []
    model.lm_head.register_forward_hook(lambda layer, *args: used.append("forward" in vars(layer)))
    found = CompactEngine(0).complete(model, prompts, sampling, seeds)
    assert all(used)
    assert CompactEngine(0).complete(model, [], sampling, []) == []
    assert found == GenerateEngine(0).complete(model, prompts, sampling, seeds)
