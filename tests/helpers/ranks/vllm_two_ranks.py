# SPDX-License-Identifier: Apache-2.0
"""vLLM's stand-in on two processes: one engine of both (tensor parallel), and one server that both ask.

Usage, under torchrun: python -m helpers.ranks.vllm_two_ranks
"""

import contextlib
import os
import warnings

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
warnings.filterwarnings("ignore")

import pytest  # noqa: E402
import torch.distributed as dist  # noqa: E402

from helpers import vllm_double  # noqa: E402
from helpers.rl import make_model, make_tokenizer  # noqa: E402
from helpers.vllm_server_double import serving  # noqa: E402
from sspo_ext.signals import StepBatch, probe_requests  # noqa: E402
from sspo_ext.train.rollout import make_engine  # noqa: E402
from sspo_ext.train.sampling import Sampling  # noqa: E402

PROMPTS = [[[5, 6, 7], [8]], [[9, 10], [11], [12, 13, 5]]]  # those of either process: not equally many
SAMPLING = Sampling(8, (1,))


def asked(rank):
    prompts = PROMPTS[rank]
    batch = StepBatch(prompts, [[[rank + 4]] for _ in prompts])
    return (
        prompts,
        [(rank, i) for i in range(len(prompts))],
        probe_requests(batch, [9], [[[1, 2 + rank]]] * len(prompts)),
    )


def answers(engine, model, rank):
    prompts, seeds, requests = asked(rank)
    found = engine.complete(model, prompts, SAMPLING, seeds)
    return found.token_ids, found.logps, engine.logprobs(requests)


def everywhere(value):
    parts = [None] * 2
    dist.all_gather_object(parts, value)
    return parts


def shared_engine(model, rank, want):
    engine = make_engine("vllm", make_tokenizer(), model="x", tensor_parallel_size=2)
    assert engine.llm.options["distributed_executor_backend"] == "external_launcher"
    assert answers(engine, model, rank) == want, "each gets the answers to its own prompts"
    first, second = everywhere([(prompts, [vars(p) for p in params]) for prompts, params in engine.llm.calls])
    assert first == second, "both ask the same, in one order"
    assert [len(prompts) for prompts, _ in first] == [5, 20]


def shared_server(model, rank, want):
    with serving() if rank == 0 else contextlib.nullcontext((None, None)) as (url, state):
        engine = make_engine("vllm_server", make_tokenizer(), url=everywhere(url)[0], workers=2)
        for _ in range(2):
            assert answers(engine, model, rank) == want
        dist.barrier()
        if rank == 0:
            update = ["/pause wait", "/start_weight_update", "/update_weights", "/finish_weight_update", "/resume"]
            assert [path for path in state.log if path in update] == update * 2
            assert state.log.count("/init_weight_transfer_engine") == 1
        dist.barrier()


def main():
    dist.init_process_group("gloo")
    rank, model = dist.get_rank(), make_model()
    with pytest.MonkeyPatch.context() as patch:
        launched = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK")}
        vllm_double.install(patch)
        want = answers(make_engine("vllm", make_tokenizer(), model="x"), model, rank)  # an engine of its own
        os.environ.update(launched)
        shared_engine(model, rank, want)
        shared_server(model, rank, want)
        with pytest.raises(ValueError, match="divides the 2 processes .* got 3"):
            make_engine("vllm", make_tokenizer(), model="x", tensor_parallel_size=3)
    if rank == 0:
        print("same answers")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
