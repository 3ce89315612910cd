# SPDX-License-Identifier: Apache-2.0
"""vLLM itself, where it is installed: log-probs of its rollouts, and values, are those of the model whose weights it
has been handed. A tiny model, in float32; on a machine without a GPU it takes a vLLM that was built for CPUs.
"""

import inspect

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("vllm")

import vllm
from helpers.recorded import Record
from helpers.rl import make_model, make_tokenizer

from sspo_ext.signals import Probe, StepBatch, probe_requests, probe_step_values, values_from_logprobs
from sspo_ext.train.rollout import make_engine
from sspo_ext.train.sampling import Sampling

pytestmark = pytest.mark.slow
RECORD = Record("vllm-0.33.0.txt")
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]
SEEDS = [(0, 3), (1, 0), (0, 4)]
ON_THIS_MACHINE = {
    "dtype": "float32", "enforce_eager": True, "max_model_len": 128, "kv_cache_memory_bytes": 2**26, "block_size": 32,
}  # fmt: skip


def model(seed=0):
    return make_model(seed, head_dim=32).eval()  # the smallest that vLLM's attention has on CPUs


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    model(seed=7).save_pretrained(folder)  # other weights than any that are handed over
    make_tokenizer().save_pretrained(folder)
    return make_engine("vllm", make_tokenizer(), model=str(folder), **ON_THIS_MACHINE)


def test_the_record_is_of_this_version():
    installed = {"LLM.generate": vllm.LLM.generate, "LLM.wake_up": vllm.LLM.wake_up, "LLM.sleep": vllm.LLM.sleep}
    for name, function in installed.items():
        assert list(RECORD.signature(f"vllm/entrypoints/llm.py:{name}").parameters) == list(
            inspect.signature(function).parameters
        )
    fields = set(vllm.SamplingParams.__struct_fields__)
    assert RECORD.names("vllm/sampling_params.py:SamplingParams") == fields


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"top_k": 5, "top_p": 0.9}])
def test_log_probs_are_those_of_the_weights_handed_over(engine, seed, options):
    policy = model(seed)
    found = engine.complete(policy, PROMPTS, Sampling(12, (1, 4), **options), SEEDS)
    assert found == engine.complete(policy, PROMPTS, Sampling(12, (1, 4), **options), SEEDS), "from their seeds alone"
    worst = 0.0
    for prompt, ids, logps in zip(PROMPTS, found.token_ids, found.logps, strict=True):
        assert 0 < len(ids) <= 12 and not set(ids[:-1]) & {1, 4} and len(logps) == len(ids)
        with torch.no_grad():
            logits = policy(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].double()
        logits /= options.get("temperature", 1.0)
        if "top_k" in options:
            from transformers import TopKLogitsWarper, TopPLogitsWarper

            logits = TopPLogitsWarper(options["top_p"])(None, TopKLogitsWarper(options["top_k"])(None, logits))
        own = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        worst = max(worst, (own - torch.tensor(logps)).abs().max().item())
    print(f"weights {seed}, {options}: log-probs apart by {worst:.1e}")
    assert worst < 2e-4


@pytest.mark.parametrize("reduce", ["joint", "logprob"])
def test_values_are_the_models_own(engine, reduce, monkeypatch):
    policy, tokenizer = model(3), make_tokenizer()
    texts = [("1+1=\n" * 8, ["1+1\n" * 8, "12\n", "#2<eos>"]), ("2+1=\n", ["3<eos>"]), ("4+4=\n", [])]
    batch = StepBatch(
        [tokenizer(prompt).input_ids for prompt, _ in texts],
        [[tokenizer(step).input_ids for step in steps] for _, steps in texts],
    )
    probe, answers = Probe("#", ends=("\n", "")), [["10", "a"], "2", ["0"]]
    want = probe_step_values(policy, batch, probe, answers, tokenizer=tokenizer, reduce=reduce)
    requests = probe_requests(batch, probe, answers, tokenizer=tokenizer, model=policy, reduce=reduce)
    engine.complete(policy, PROMPTS, Sampling(4, (1,)), SEEDS)
    outputs, generate = [], engine.llm.generate

    def kept(*args, **kwargs):
        outputs.extend(generate(*args, **kwargs))
        return outputs[-len(args[0]) :]

    monkeypatch.setattr(engine.llm, "generate", kept)
    logprobs = engine.logprobs(requests)
    outputs.clear()
    assert logprobs == [pytest.approx(x, abs=1e-4) for x in engine.logprobs(requests)]
    found = values_from_logprobs(requests, logprobs)
    print(f"{reduce}: values apart by {(found.values - want.values).abs().max():.1e}")
    torch.testing.assert_close(found.values, want.values, rtol=1e-3, atol=1e-6)
    # the second time everything but the last, unfilled block comes from the prefix cache
    cached = sum(o.num_cached_tokens for o in outputs)
    total = sum(len(o.prompt_token_ids) for o in outputs)
    print(f"{cached} of {total} tokens of probes from the prefix cache")
    assert cached > 0.4 * total


def test_a_prompts_log_probs_do_not_read_the_prefix_cache(engine):
    """Why probes are asked as they are."""
    ids = [5, 6, 7, 8] * 25
    ask = [{"prompt_token_ids": ids}]
    for params, cached in (({}, False), ({}, True), ({"prompt_logprobs": 0}, False)):
        given = vllm.SamplingParams(max_tokens=1, detokenize=False, **params)
        (found,) = engine.llm.generate(ask, sampling_params=[given], use_tqdm=False)
        assert (found.num_cached_tokens > 0) == cached, params
