# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` itself, where vLLM is installed: what is asked of it over HTTP, but for the weights. They go by NCCL,
and need a GPU at either end. The server loads the policy from its folder here.
"""

import contextlib
import os
import socket
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("vllm")

from helpers.rl import make_model, make_tokenizer

from sspo_ext.signals import StepBatch, probe_requests, probe_step_values, values_from_logprobs
from sspo_ext.train.rollout import make_engine
from sspo_ext.train.sampling import Sampling
from sspo_ext.train.vllm_server import VLLMServer

pytestmark = pytest.mark.slow
PROMPTS, SEEDS = [[5, 6, 7], [8], [9, 10, 11, 12]], [(0, 3), (1, 0), (0, 4)]


@contextlib.contextmanager
def serving(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = (
        f"--host 127.0.0.1 --port {port} --dtype float32 --enforce-eager --max-model-len 128 --block-size 32 "
        "--kv-cache-memory-bytes 67108864 --enable-scale-out --logprobs-mode processed_logprobs "
        "--generation-config vllm"
    ).split()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder), *options]
    weights = ["--weight-transfer-config", '{"backend": "nccl"}']
    log = open(folder / "server.log", "w")  # noqa: SIM115  # the process writes on
    server = subprocess.Popen(
        [*command, *weights], env={**os.environ, "VLLM_SERVER_DEV_MODE": "1"}, stdout=log, stderr=subprocess.STDOUT
    )
    try:
        yield f"http://127.0.0.1:{port}", server
    finally:
        server.terminate()
        server.wait(60)
        log.close()


def made(url, server, folder):
    for _ in range(900):
        try:
            return make_engine("vllm_server", make_tokenizer(), url=url, workers=4)
        except ConnectionError as error:
            assert "refused" in str(error), error
            assert server.poll() is None, (folder / "server.log").read_text()[-3000:]
            time.sleep(1)
    raise AssertionError((folder / "server.log").read_text()[-3000:])


def test_rollouts_and_values(tmp_path, monkeypatch):
    policy, tokenizer = make_model(head_dim=32).eval(), make_tokenizer()
    policy.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    batch = StepBatch([tokenizer("1+1=\n").input_ids], [[tokenizer("1+1\n").input_ids, tokenizer("#2").input_ids]])
    requests = probe_requests(batch, "#", [["10", "2"]], tokenizer=tokenizer, model=policy)
    monkeypatch.setattr(VLLMServer, "load_weights", lambda self, model: None)
    with serving(tmp_path) as (url, server):
        engine = made(url, server, tmp_path)
        found = engine.complete(policy, PROMPTS, Sampling(12, (1, 4), temperature=0.7), SEEDS)
        again = engine.complete(policy, PROMPTS[::-1], Sampling(12, (1, 4), temperature=0.7), SEEDS[::-1])
        assert again.token_ids == found.token_ids[::-1]
        values = values_from_logprobs(requests, engine.logprobs(requests))
    for prompt, ids, logps in zip(PROMPTS, found.token_ids, found.logps, strict=True):
        with torch.no_grad():
            logits = policy(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].double() / 0.7
        own = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert (own - torch.tensor(logps)).abs().max() < 2e-4
    own = probe_step_values(policy, batch, "#", [["10", "2"]], tokenizer=tokenizer)
    torch.testing.assert_close(values.values, own.values, rtol=1e-3, atol=1e-6)
