# SPDX-License-Identifier: Apache-2.0
"""The vLLM engine against a stand-in for the parts of vLLM it uses: LLM, LLM.generate, SamplingParams, the worker's
model and its load_weights, reset_prefix_cache, named as in vLLM's sources. What vLLM does with them needs a GPU.

Mutations of train/vllm_engine.py, and the test that went red:
  prompts or outputs turned round, top_k 0 handed on, ends or an option lost  test_what_is_asked_and_given_back
  one seed for all, seeds that meet                                           test_many_seeds_do_not_meet
  weights not handed over, or once only; cached prefixes kept                 test_weights_come_first
  adapters not merged, not taken out again, under PEFT's names                test_adapters_are_merged_for_the_moment
  merged in place and unmerged                                                test_a_base_in_bfloat16_stays_bit_by_bit
  external_launcher always, or never                                          test_without_and_with_a_launcher
"""

import copy
import os
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from helpers.rl import make_model, make_tokenizer

from sspo_ext.train.rollout import make_engine
from sspo_ext.train.sampling import Sampling

PROMPTS = [[5, 6, 7], [8], [9, 10]]
SEEDS = [(0, 3), (1, 0), (0, 4)]


@dataclass
class SamplingParams:
    """Only what the engine may set; vLLM's names and defaults."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    detokenize: bool = True


@dataclass
class LLM:
    model: str
    gpu_memory_utilization: float = 0.9
    distributed_executor_backend: str | None = None
    max_model_len: int | None = None
    generation_config: str = "auto"
    events: list = field(default_factory=list)

    def __post_init__(self):
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0", "the worker would be in another process"
        if self.distributed_executor_backend == "external_launcher":
            int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])  # as vLLM reads them
        worker = SimpleNamespace(model_runner=SimpleNamespace(model=self))
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))
        self.weights, self.calls = {}, []

    def load_weights(self, weights):
        self.events.append("weights")
        self.weights = {name: weight.clone() for name, weight in weights}

    def reset_prefix_cache(self):
        self.events.append("reset")

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        """Answers in the order of the prompts, each its prompt, its seed and its end."""
        assert len(prompts) == len(sampling_params) and not use_tqdm
        self.events.append("generate")
        self.calls.append(sampling_params)
        return [
            SimpleNamespace(outputs=[SimpleNamespace(token_ids=(*p["prompt_token_ids"], s.seed, s.stop_token_ids[0]))])
            for p, s in zip(prompts, sampling_params, strict=True)
        ]


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")  # so that what the engine sets is taken back
        monkeypatch.delenv(name)


def engine(**options):
    return make_engine("vllm", make_tokenizer(), model="folder", **options)


def sampling(**options):
    return Sampling(**{"max_completion_length": 10, "eos_token_ids": (4, 1), **options})


def test_what_is_asked_and_given_back():
    vllm = engine()
    completions = vllm.complete(make_model(), PROMPTS, sampling(temperature=0.7, top_p=0.9, top_k=5), SEEDS)
    (params,) = vllm.llm.calls
    seeds = [p.seed for p in params]
    assert completions == [[*prompt, seed, 4] for prompt, seed in zip(PROMPTS, seeds, strict=True)]
    assert len(set(seeds)) == 3 and all(type(s) is int and 0 <= s < 2**31 for s in seeds)
    assert all(
        (p.n, p.temperature, p.top_p, p.top_k, p.max_tokens, p.stop_token_ids, p.detokenize)
        == (1, 0.7, 0.9, 5, 10, [4, 1], False)
        for p in params
    )
    # a row's seed comes from its own integers, not from its place or its neighbours
    vllm.complete(make_model(), PROMPTS[::-1], sampling(), SEEDS[::-1])
    assert [p.seed for p in vllm.llm.calls[1]] == seeds[::-1]
    assert {p.top_k for p in vllm.llm.calls[1]} == {-1}, "all tokens"


def test_the_checkpoints_generation_config_is_not_read():
    assert engine().llm.generation_config == "vllm"
    assert engine(generation_config="auto").llm.generation_config == "auto", "unless it is asked for"


def test_many_seeds_do_not_meet():
    vllm, seeds = engine(), [(step, row) for step in range(30) for row in range(64)]
    vllm.complete(make_model(), [[5]] * len(seeds), sampling(), seeds)
    assert len({p.seed for p in vllm.llm.calls[0]}) == len(seeds)


def test_weights_come_first():
    model, vllm = make_model(), engine()
    vllm.complete(model, PROMPTS, sampling(), SEEDS)
    assert vllm.llm.events == ["weights", "reset", "generate"]
    expected = dict(model.named_parameters())
    assert vllm.llm.weights.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in vllm.llm.weights.items())
    with torch.no_grad():
        model.lm_head.weight += 1
    vllm.complete(model, PROMPTS, sampling(), SEEDS)
    assert torch.equal(vllm.llm.weights["lm_head.weight"], model.lm_head.weight), "those of this batch"


def test_adapters_are_merged_for_the_moment():
    peft = pytest.importorskip("peft")
    plain = make_model()
    names = dict(plain.named_parameters()).keys()
    before = plain.model.layers[0].self_attn.q_proj.weight.clone()
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model, vllm = peft.get_peft_model(plain, config), engine()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
        model.base_model.model.lm_head.modules_to_save["default"].weight += 1
    vllm.complete(model, PROMPTS, sampling(), SEEDS)
    given = vllm.llm.weights
    assert given.keys() == names, "the checkpoint's names, each of them once"
    merged = before + 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(given["model.layers.0.self_attn.q_proj.weight"], merged)
    assert torch.equal(given["lm_head.weight"], model.base_model.model.lm_head.modules_to_save["default"].weight)
    assert not layer.merged
    assert torch.equal(layer.base_layer.weight, before)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_a_base_in_bfloat16_stays_bit_by_bit(options):
    """To merge and to unmerge rounds every weight twice: .13 % of a base after one update."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", **options)
    model, vllm = peft.get_peft_model(make_model().bfloat16(), config), engine()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for _ in range(2):
        vllm.complete(model, PROMPTS, sampling(), SEEDS)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    assert merged.keys() == vllm.llm.weights.keys()
    assert all(torch.equal(weight, merged[name]) for name, weight in vllm.llm.weights.items())


def test_without_and_with_a_launcher(monkeypatch):
    """vLLM's external_launcher reads a rank from the environment, which a plain process does not have."""
    assert engine().llm.distributed_executor_backend is None
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    llm = engine(gpu_memory_utilization=0.4, max_model_len=99).llm
    assert (llm.distributed_executor_backend, llm.gpu_memory_utilization) == ("external_launcher", 0.4)
    assert (llm.model, llm.max_model_len) == ("folder", 99)


def test_engines_of_several_processes_are_refused():
    with pytest.raises(ValueError, match="rollout_options: expected tensor_parallel_size 1, .* got 2"):
        engine(tensor_parallel_size=2)
