# SPDX-License-Identifier: Apache-2.0
"""vLLM on other GPUs, over HTTP: a stand-in for `vllm serve` 0.33 whose routes and fields are vLLM's recorded ones.

What was broken -> what went red:
  weights sent while the server takes requests, once only, not dropped from its cache  test_weights_come_first
  metadata in another order or dtype than the weights, adapters not merged             test_adapters_are_sent_merged
  log-probs of the next token, answers in another order                                test_rollouts_and_values
  a server's version, log-probs, settings or missing endpoints taken                   test_servers_that_do_not_do
  sent by every process, or without waiting for the others                             test_vllm_ranks.py
"""

import copy

import pytest
import torch

pytest.importorskip("transformers")

from helpers import vllm_double
from helpers.rl import make_model, make_tokenizer, make_trainer
from helpers.vllm_server_double import CONFIG, serving

from sspo_ext.signals import StepBatch, probe_requests, probe_step_values, values_from_logprobs
from sspo_ext.train.rollout import make_engine
from sspo_ext.train.sampling import Sampling

PROMPTS = [[5, 6, 7], [8], [9, 10]]
SEEDS = [(0, 3), (1, 0), (0, 4)]
UPDATE = [
    "/pause wait", "/start_weight_update", "/update_weights", "/finish_weight_update", "/resume",
]  # fmt: skip
START = ["/version", "/server_info", "/get_world_size", "/init_weight_transfer_engine"]


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    vllm_double.install(monkeypatch)


def engine(url, **options):
    return make_engine("vllm_server", make_tokenizer(), url=url + "/", workers=3, **options)


def test_rollouts_and_values():
    """The same as from an engine in this process, token by token."""
    model, tokenizer, sampling = make_model(), make_tokenizer(), Sampling(10, (4, 1), temperature=0.7, top_k=6)
    beside = make_engine("vllm", tokenizer, model="x", return_sampling_mask=True)
    want = beside.complete(model, PROMPTS, sampling, SEEDS)
    batch = StepBatch([tokenizer("1+1=\n").input_ids], [[tokenizer("1+1\n").input_ids, tokenizer("#2").input_ids]])
    requests = probe_requests(batch, "#", [["10", "2"]], tokenizer=tokenizer, model=model)
    with serving(return_sampling_mask=True) as (url, _):
        server = engine(url)
        with pytest.raises(RuntimeError, match="logprobs: expected a call of complete before"):
            server.logprobs(requests)
        found = server.complete(model, PROMPTS, sampling, SEEDS)
        values = values_from_logprobs(requests, server.logprobs(requests))
    assert found.token_ids == want.token_ids and found.kept == want.kept
    assert len({tuple(ids) for ids in found.token_ids}) == 3
    for a, b in zip(found.logps, want.logps, strict=True):
        assert a == pytest.approx(b, abs=1e-12)
    own = probe_step_values(model, batch, "#", [["10", "2"]], tokenizer=tokenizer)
    torch.testing.assert_close(values.values, own.values, rtol=2e-5, atol=1e-9)


def test_weights_come_first():
    model = make_model()
    with serving() as (url, state):
        server = engine(url)
        server.complete(model, PROMPTS, Sampling(4, (1,)), SEEDS)
        assert state.log == START + UPDATE
        with torch.no_grad():
            model.lm_head.weight += 1
        server.complete(model, PROMPTS, Sampling(4, (1,)), SEEDS)
        assert state.log == START + UPDATE * 2, "they meet once"
        assert torch.equal(state.llm.loaded["lm_head.weight"], model.lm_head.weight)
        assert state.llm.loaded.keys() == dict(model.named_parameters()).keys()


def test_a_server_goes_on_after_weights_that_fail(monkeypatch):
    def fails(self):
        raise OSError("the network is gone")

    with serving() as (url, state):
        server = engine(url)
        monkeypatch.setattr(vllm_double.Transfer, "send_weights", fails)
        with pytest.raises(OSError, match="gone"):
            server.complete(make_model(), PROMPTS, Sampling(4, (1,)), SEEDS)
        assert state.log[-1] == "/resume"


@pytest.mark.parametrize("kind", ["lora", "embeddings", "tied"])
def test_adapters_are_sent_merged(kind):
    """What is told before the weights come is what comes: names, dtypes and shapes, in one order."""
    model = make_model(tie_word_embeddings=kind == "tied").bfloat16()
    if kind != "tied":
        peft = pytest.importorskip("peft")
        more = {"modules_to_save": ["embed_tokens"]} if kind == "embeddings" else {}
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", **more))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.normal_()
    plain = copy.deepcopy(model).merge_and_unload() if kind != "tied" else model
    with serving() as (url, state):
        engine(url).complete(model, PROMPTS, Sampling(1, (1,)), SEEDS)
        expected = dict(plain.named_parameters())
        assert state.llm.loaded.keys() == expected.keys()
        assert all(torch.equal(weight, expected[name]) for name, weight in state.llm.loaded.items())


def changed(**parts):
    return {name: {**part, **parts.get(name, {})} for name, part in CONFIG.items()}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"missing": ["/server_info"]}, ConnectionError, "404 .*; start it with VLLM_SERVER_DEV_MODE=1"),
        ({"missing": ["/inference/v1/generate"]}, ConnectionError, "404 .*; start it with --enable-scale-out"),
        ({"config": changed(model_config={"logprobs_mode": "raw_logprobs"})}, ValueError,
         "expected a server with --logprobs-mode processed_logprobs, got 'raw_logprobs'"),
        ({"config": changed(model_config={"generation_config": "auto"})}, ValueError,
         "expected a server with --generation-config vllm, got 'auto'"),
        ({"config": changed(weight_transfer_config={"backend": "ipc"})}, ValueError, "--weight-transfer-config"),
        ({"config": {**CONFIG, "weight_transfer_config": None}}, ValueError, "--weight-transfer-config .*got None"),
    ],
)  # fmt: skip
def test_servers_that_do_not_do(options, error, message):
    with serving(**options) as (url, _), pytest.raises(error, match=message):
        engine(url).complete(make_model(), PROMPTS, Sampling(1, (1,)), SEEDS)


def test_versions_that_do_not_do(monkeypatch):
    with serving() as (url, state):
        state.version = "0.34.1"
        with pytest.raises(ValueError, match="expected vLLM 0.33, got 0.34.1"):
            engine(url)
        vllm_double.install(monkeypatch, "0.32.0")
        with pytest.raises(ImportError, match="vllm: sspo_ext was tested with 0.33, and 0.32.0 is installed"):
            engine(url)
    vllm_double.install(monkeypatch)
    with pytest.raises(ConnectionError, match=f"^{url}/version: "):
        engine(url)
    with pytest.raises(ValueError, match="rollout_options: expected 'url' with rollout_engine 'vllm_server'"):
        make_engine("vllm_server", make_tokenizer())
    with pytest.raises(ValueError, match="workers: "):
        make_engine("vllm_server", make_tokenizer(), url=url, workers=0)


def test_a_spoilt_answer(monkeypatch):
    with serving() as (url, state):
        server = engine(url)
        monkeypatch.setattr(state, "_generate", lambda body: {"choices": [{"token_ids": [3], "logprobs": None}]})
        with pytest.raises(ValueError, match="expected tokens and log-probs in the answer, got .*choices"):
            server.complete(make_model(), PROMPTS, Sampling(1, (1,)), SEEDS)


def test_a_training(tmp_path):
    with serving() as (url, state):
        trainer = make_trainer(
            tmp_path, rollout_engine="vllm_server", rollout_options={"url": url}, probe_engine="rollout"
        )
        trainer.train()
        assert state.log == START + UPDATE * 2 and state.llm.events.count("weights") == 2
        loaded, trained = state.llm.loaded["lm_head.weight"], trainer.model.lm_head.weight
        assert not torch.equal(loaded, trained), "those before the last update"
