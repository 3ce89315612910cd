# SPDX-License-Identifier: Apache-2.0
"""vLLM inside the trainer's process, against a stand-in that holds every call against vLLM 0.33's signatures.

What vLLM does with them needs a GPU; test_vllm_real.py asks vLLM itself, where it is installed.

What was broken -> what went red:
  prompts or outputs turned round, top_k or an end lost, an option misspelt  test_what_is_asked_and_given_back
  one seed for all, seeds that meet                                          test_many_seeds_do_not_meet
  weights not handed over, or once only; cached prefixes kept                test_weights_come_first
  asleep while asked, woken in another order, level 1, never                 test_sleep_and_wake
  log-probs of the next token, or of the drawn one; spellings mixed up       test_values_are_the_models_own
  prompt_logprobs in place of single tokens                                  test_probes_use_the_prefix_cache
  log-probs or kept tokens of another place                                  test_logps_and_kept_tokens
  external_launcher always, or never                                         test_without_and_with_a_launcher
  any version taken                                                          test_another_version_is_refused
"""

import copy
import inspect

import pytest
import torch

pytest.importorskip("transformers")

from helpers import vllm_double
from helpers.rl import ROWS, make_model, make_tokenizer, make_trainer

from sspo_ext.signals import Probe, StepBatch, probe_requests, probe_step_values, values_from_logprobs
from sspo_ext.train.rollout import make_engine
from sspo_ext.train.sampling import Sampling

PROMPTS = [[5, 6, 7], [8], [9, 10]]
SEEDS = [(0, 3), (1, 0), (0, 4)]


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    vllm_double.install(monkeypatch)


def engine(**options):
    return make_engine("vllm", make_tokenizer(), model="folder", **options)


def sampling(**options):
    return Sampling(**{"max_completion_length": 10, "eos_token_ids": (4, 1), **options})


def test_what_is_asked_and_given_back():
    vllm, model = engine(), make_model()
    found = vllm.complete(model, PROMPTS, sampling(temperature=0.7, top_p=0.9, top_k=5), SEEDS)
    ((prompts, params),) = vllm.llm.calls
    assert [p["prompt_token_ids"] for p in prompts] == PROMPTS
    seeds = [p.seed for p in params]
    assert len(set(seeds)) == 3 and all(type(s) is int and 0 <= s < 2**31 for s in seeds)
    for p in params:
        assert (p.n, p.temperature, p.top_p, p.top_k, p.max_tokens) == (1, 0.7, 0.9, 5, 10)
        assert (p.stop_token_ids, p.ignore_eos, p.logprobs, p.detokenize) == ([4, 1], True, 0, False)
    assert len({tuple(ids) for ids in found.token_ids}) == 3, "or their order would not show"
    # a row's completion comes from its own prompt and integers, not from its place or its neighbours
    again = vllm.complete(model, PROMPTS[::-1], sampling(temperature=0.7, top_p=0.9, top_k=5), SEEDS[::-1])
    assert again.token_ids == found.token_ids[::-1]


@pytest.mark.parametrize(
    "call",
    [
        lambda llm: llm.generate([], sampling_param=[]),
        lambda llm: llm.generate([], [], False),
        lambda llm: llm.wake_up(tag=["weights"]),
        lambda llm: llm.sleep(mode="abort", levels=2),
        lambda llm: llm.collective_rpc("reload_weights", kwargs={"weights": iter(())}),
        lambda llm: vllm_double.SamplingParams(max_token=3),
        lambda llm: vllm_double.LLM(model="x", gpu_memory=0.3),
    ],
)
def test_the_stand_in_takes_what_vllm_takes(call):
    llm = engine().llm
    with pytest.raises(TypeError):
        call(llm)


def test_what_the_record_says():
    assert vllm_double.RECORD.source.startswith("vllm 0.33.0, ")
    asked = vllm_double.RECORD.signature("vllm/entrypoints/llm.py:LLM.generate").parameters
    assert [n for n, p in asked.items() if p.kind == inspect.Parameter.KEYWORD_ONLY][0] == "use_tqdm"


def test_vllms_settings():
    """The checkpoint's generation config is not read, prefixes are cached, log-probs are those of sampling."""
    given = engine().llm.options
    assert (given["generation_config"], given["enable_prefix_caching"]) == ("vllm", True)
    assert (given["logprobs_mode"], given["gpu_memory_utilization"]) == ("processed_logprobs", 0.3)
    assert engine(generation_config="auto").llm.options["generation_config"] == "auto", "unless it is asked for"


def test_many_seeds_do_not_meet():
    vllm, seeds = engine(), [(step, row) for step in range(10) for row in range(20)]
    vllm.complete(make_model(), [[5]] * len(seeds), sampling(max_completion_length=1), seeds)
    assert len({p.seed for p in vllm.llm.calls[0][1]}) == len(seeds)


def test_weights_come_first():
    model, vllm = make_model(), engine()
    vllm.complete(model, PROMPTS, sampling(), SEEDS)
    assert vllm.llm.events == ["weights", "reset", "generate"]
    expected = dict(model.named_parameters())
    assert vllm.llm.loaded.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in vllm.llm.loaded.items())
    with torch.no_grad():
        model.lm_head.weight += 1
    vllm.complete(model, PROMPTS, sampling(), SEEDS)
    assert torch.equal(vllm.llm.loaded["lm_head.weight"], model.lm_head.weight), "those of this batch"


def test_a_cache_that_stays_is_an_error(monkeypatch):
    vllm = engine()
    monkeypatch.setattr(vllm.llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(RuntimeError, match="prefix cache could not be reset"):
        vllm.complete(make_model(), PROMPTS, sampling(), SEEDS)


def test_sleep_and_wake():
    """Memory is given back before an update, weights come back before the cache, and with them is the engine ready."""
    model, vllm = make_model(), engine(enable_sleep_mode=True)
    requests = probe_requests(StepBatch([[5, 6]], [[[7]]]), [9], [[[1, 2]]])
    first = vllm.complete(model, PROMPTS, sampling(), SEEDS)
    values = vllm.logprobs(requests)
    vllm.rest()
    vllm.rest()
    with pytest.raises(RuntimeError, match="logprobs: expected a call of complete before"):
        vllm.logprobs(requests)
    assert vllm.complete(model, PROMPTS, sampling(), SEEDS) == first
    assert vllm.logprobs(requests) == values
    once = ["weights", "reset", "generate", "generate"]
    slept = ["sleep 2", "wake ['weights']", "weights", "wake ['kv_cache']", "reset", "generate", "generate"]
    assert vllm.llm.events == once + slept
    awake = engine()
    awake.complete(model, PROMPTS, sampling(), SEEDS)
    awake.rest()
    assert awake.llm.events == ["weights", "reset", "generate"], "without enable_sleep_mode it stays"


def states(tokenizer):
    texts = [("1+1=\n", ["1+1\n", "#2<eos>"]), ("2+1=\n", ["3<eos>"]), ("4+4=\n", []), ("a+b=\n", ["a\n", "b\n", "c"])]
    return StepBatch(
        [tokenizer(prompt).input_ids for prompt, _ in texts],
        [[tokenizer(step).input_ids for step in steps] for _, steps in texts],
    )


@pytest.mark.parametrize("reduce", ["joint", "mean", "logprob"])
def test_values_are_the_models_own(reduce):
    model, tokenizer, vllm = make_model(), make_tokenizer(), engine()
    batch, probe, answers = states(tokenizer), Probe("#", ends=("\n", "")), [["10", "a"], "2", ["0"], "abc"]
    want = probe_step_values(model, batch, probe, answers, tokenizer=tokenizer, reduce=reduce)
    requests = probe_requests(batch, probe, answers, tokenizer=tokenizer, model=model, reduce=reduce)
    vllm.complete(model, PROMPTS, sampling(), SEEDS)
    found = values_from_logprobs(requests, vllm.logprobs(requests))
    torch.testing.assert_close(found.values, want.values, rtol=2e-5, atol=1e-9)
    assert torch.equal(found.offsets, want.offsets) and found.values.unique().numel() > 5


def test_probes_use_the_prefix_cache():
    """vLLM does not read its prefix cache for a request with prompt_logprobs (its sampling_params.py says why)."""
    model, tokenizer, vllm = make_model(), make_tokenizer(), engine()
    requests = probe_requests(states(tokenizer), "#", ["10", "2", "0", "abc"], tokenizer=tokenizer)
    vllm.complete(model, PROMPTS, sampling(), SEEDS)
    vllm.llm.cached = 0
    vllm.logprobs(requests)
    asked = vllm.llm.calls[-1]
    assert all(p.prompt_logprobs is None and p.max_tokens == 1 for p in asked[1])
    total = sum(len(p["prompt_token_ids"]) for p in asked[0])
    assert vllm.llm.cached > 0.6 * total
    prompts = [tuple(p["prompt_token_ids"]) for p in asked[0]]
    assert len(set(prompts)) == len(prompts), "nothing is asked twice"


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"top_p": 0.8, "top_k": 6}])
def test_logps_and_kept_tokens(options):
    model, vllm = make_model(), engine(return_sampling_mask=True)
    found = vllm.complete(model, PROMPTS, sampling(**options), SEEDS)
    for prompt, ids, logps, kept in zip(PROMPTS, found.token_ids, found.logps, found.kept, strict=True):
        assert len(ids) == len(logps) == len(kept)
        with torch.no_grad():
            logits = model.eval()(torch.tensor([[*prompt, *ids]])).logits[0].double()
        for at, (token, logp, some) in enumerate(zip(ids, logps, kept, strict=True), start=len(prompt) - 1):
            scores = logits[at] / options.get("temperature", 1.0)
            expected = scores[token] - scores[torch.tensor(some)].logsumexp(0)
            assert abs(logp - expected.item()) < 1e-5 and token in some
            assert len(some) <= 6 or "top_k" not in options
    assert engine().complete(model, PROMPTS, sampling(), SEEDS).kept is None, "without return_sampling_mask"


def test_a_base_in_bfloat16_stays_bit_by_bit():
    """To merge and to unmerge rounds every weight twice: .13 % of a base after one update."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", modules_to_save=["embed_tokens"])
    model, vllm = peft.get_peft_model(make_model().bfloat16(), config), engine()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for _ in range(2):
        vllm.complete(model, PROMPTS, sampling(max_completion_length=1), SEEDS)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    merged = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    assert merged.keys() == vllm.llm.loaded.keys()
    assert all(torch.equal(weight, merged[name]) for name, weight in vllm.llm.loaded.items())


def test_without_and_with_a_launcher(monkeypatch):
    """vLLM's external_launcher reads a rank from the environment, which a plain process does not have."""
    assert "distributed_executor_backend" not in engine().llm.options
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    given = engine(gpu_memory_utilization=0.4, max_model_len=99).llm.options
    assert (given["distributed_executor_backend"], given["gpu_memory_utilization"]) == ("external_launcher", 0.4)
    assert (given["model"], given["max_model_len"]) == ("folder", 99)


def test_parallel_engines_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="tensor_parallel_size that divides the 1 processes .* got 2"):
        engine(tensor_parallel_size=2)
    with pytest.raises(ValueError, match="expected pipeline_parallel_size 1 .* got 2"):
        engine(pipeline_parallel_size=2)
    with pytest.raises(ValueError, match="rollout_options: expected 'model' with rollout_engine 'vllm'"):
        make_engine("vllm", make_tokenizer())


@pytest.mark.parametrize("version", ["0.32.1", "0.34.0"])
def test_another_version_is_refused(version, monkeypatch):
    vllm_double.install(monkeypatch, version)
    with pytest.raises(ImportError, match=f"vllm: sspo_ext was tested with 0.33, and {version} is installed"):
        engine()


# ---- in a training


def trained(folder, **options):
    tokenizer = make_tokenizer()
    given = {"rollout_engine": "vllm", "rollout_options": {"model": "x", "enable_sleep_mode": True}, **options}
    trainer = make_trainer(folder, rows=ROWS, tokenizer=tokenizer, eval_dataset=ROWS[:3], **given)
    seen = []
    trainer.on_rollouts = lambda rollouts: seen.extend((r.completion_ids, r.values) for r in rollouts)
    trainer.evaluate()
    trainer.train()
    return trainer, seen


def test_a_training_probes_through_the_engine(tmp_path):
    """The same rollouts, asked of the policy and of the engine: the same values, and updates as far apart as these."""
    policy, own = trained(tmp_path / "policy")
    engines, asked = trained(tmp_path / "engine", probe_engine="rollout")
    assert [ids for ids, _ in own] == [ids for ids, _ in asked] and len(own) == 8
    for (_, a), (_, b) in zip(own, asked, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-7)
    assert any(len(values) > 1 for _, values in own)
    for (name, a), (_, b) in zip(policy.model.named_parameters(), engines.model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    events = engines.engine.llm.events
    assert events.count("sleep 2") == 3 and events.count("generate") == 5, "evaluation, and two updates that probe"
    assert policy.engine.llm.events.count("sleep 2") == 3 and events[-1] == "sleep 2"


def test_what_cannot_probe_is_refused(tmp_path):
    with pytest.raises(ValueError, match="probe_engine: expected a rollout engine with `logprobs`, .*CompactEngine"):
        make_trainer(tmp_path, probe_engine="rollout")
    with pytest.raises(ValueError, match="probe_engine: expected one of 'policy', 'rollout'"):
        make_trainer(tmp_path, probe_engine="vllm")
    for name, value in (("engine", "packed"), ("seed", 1), ("num_samples", 5)):
        with pytest.raises(ValueError, match=f"probe_options: {name} has no effect with probe_engine='rollout'"):
            make_trainer(tmp_path, probe_engine="rollout", probe_options={name: value})
    with pytest.raises(ValueError, match="probe_engine: expected 'policy' with probe_options mode 'graded'"):
        make_trainer(tmp_path, probe_engine="rollout", probe_options={"mode": "graded"})
    with pytest.raises(ValueError, match="probe_engine: expected 'policy' with combine='outcome'"):
        make_trainer(tmp_path, probe_engine="rollout", combine="outcome")
