# SPDX-License-Identifier: Apache-2.0
"""A stand-in for vLLM 0.33 with a local model behind it. Every call is held against vLLM's recorded signatures.

It is as strict as vLLM where that matters: memory that sleeps cannot be used, weights are loaded into memory that is
there, and what the prefix cache has from older weights is an error here, where vLLM would use it without a word.
"""

import functools
import os
import sys
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType, SimpleNamespace

import torch

from .recorded import Record
from .rl import make_model

RECORD = Record("vllm-0.33.0.txt")
_LLM = "vllm/entrypoints/llm.py:LLM"
_RUNNERS = ("vllm/v1/worker/gpu_model_runner.py", "vllm/v1/worker/gpu/model_runner.py")


class SamplingParams:
    def __init__(self, **kwargs):
        vars(self).update(RECORD.bind("vllm/sampling_params.py:SamplingParams", **kwargs))
        tokens = self.logprob_token_ids
        if tokens and self.logprobs not in (None, len(tokens)):
            raise ValueError("When both logprobs and logprob_token_ids are set, logprobs must equal their number")


class LLM:
    """Answers with a model of `make_model`, whose weights are those that were loaded last."""

    def __init__(self, *args, **kwargs):
        given = RECORD.bind(_LLM, self, *args, **kwargs)
        unknown = set(given.pop("kwargs")) - RECORD.names("vllm/engine/arg_utils.py:EngineArgs")
        if unknown:
            raise TypeError(f"EngineArgs: unexpected arguments {sorted(unknown)}")
        self.options = kwargs
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0", "the worker would be in another process"
        if kwargs.get("distributed_executor_backend") == "external_launcher":
            int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])  # as vLLM reads them
        self.model = make_model(seed=9).eval()
        self.awake, self.events, self.calls, self.cached = {"weights", "kv_cache"}, [], [], 0
        self.seen, self.loaded, self.stale = [], None, False

    @RECORD.follows(f"{_LLM}.collective_rpc")
    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        assert method == "reload_weights"
        RECORD.bind("vllm/v1/worker/gpu_worker.py:Worker.reload_weights", self, *args, **(kwargs or {}))
        for runner in _RUNNERS:  # vLLM has two, and chooses by the model
            found = RECORD.bind(f"{runner}:GPUModelRunner.reload_weights", self, *args, **(kwargs or {}))
        assert "weights" in self.awake, "weights are loaded into memory that sleeps"
        self.loaded = {name: weight.clone() for name, weight in found["weights_iterator"]}
        self.model.load_state_dict(self.loaded, strict=False)
        self.stale = True
        self.events.append("weights")
        return [None]

    @RECORD.follows(f"{_LLM}.reset_prefix_cache")
    def reset_prefix_cache(self, reset_running_requests=False, reset_connector=False):
        self.events.append("reset")
        self.seen, self.stale = [], False
        return True

    @RECORD.follows(f"{_LLM}.sleep")
    def sleep(self, level=1, mode="abort"):
        assert self.options.get("enable_sleep_mode"), "vLLM refuses without enable_sleep_mode"
        self.awake, self.seen = set(), []
        if level == 2:
            for p in self.model.parameters():
                p.data.fill_(float("nan"))
        self.events.append(f"sleep {level}")

    @RECORD.follows(f"{_LLM}.wake_up")
    def wake_up(self, tags=None):
        self.awake |= set(tags or ("weights", "kv_cache"))
        self.events.append(f"wake {tags}")
        return len(self.awake) == 2

    @RECORD.follows(f"{_LLM}.generate")
    def generate(self, prompts, sampling_params=None, *, use_tqdm=True, **others):
        assert len(self.awake) == 2, "asked while it sleeps"
        assert not self.stale, "prefixes of older weights are cached"
        assert len(prompts) == len(sampling_params) and not use_tqdm
        self.events.append("generate")
        self.calls.append((prompts, sampling_params))
        return [self._answer(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)]

    def _answer(self, prompt, params):
        ids, places, kept = list(prompt), [], []
        self._cache(ids, params)
        generator = torch.Generator().manual_seed(params.seed)
        while True:
            scores, mask = narrowed(self.logits(ids), params)
            logp = scores.log_softmax(-1)
            token = (
                int(logp.argmax()) if not params.temperature else int(logp.exp().multinomial(1, generator=generator))
            )
            shown = [token, *(params.logprob_token_ids or [])]
            places.append({t: value(RECORD, "vllm/logprobs.py:Logprob", logprob=logp[t].item()) for t in shown})
            kept.append(mask)
            ids.append(token)
            if len(places) == params.max_tokens or token in params.stop_token_ids or ():
                break
            if token == 1 and not params.ignore_eos:  # the model's own end
                break
        masks = value(RECORD, "vllm/outputs.py:SamplingMask", token_ids=kept) if self._masks else None
        output = value(
            RECORD, "vllm/outputs.py:CompletionOutput", index=0, text="", token_ids=tuple(ids[len(prompt) :]),
            cumulative_logprob=None, logprobs=None if params.logprobs is None else places, sampling_mask=masks,
        )  # fmt: skip
        return SimpleNamespace(outputs=[output])

    @property
    def _masks(self):
        return self.options.get("return_sampling_mask")

    def _cache(self, ids, params):
        """Counts the tokens of prompts that a prefix cache with blocks of one token would have had."""
        if self.options.get("enable_prefix_caching") and params.prompt_logprobs is None:
            self.cached += max((common(ids, other) for other in self.seen), default=0)
        self.seen.append(ids)

    @torch.no_grad()
    def logits(self, ids):
        return self.model(torch.tensor([ids])).logits[0, -1].double()


def value(record, name, **fields):
    """An object with the fields of a recorded class, which must be its own."""
    return SimpleNamespace(**record.bind(name, **fields))


def common(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def narrowed(logits, params):
    """Logits over the temperature, -inf for what top_k and top_p drop; the ids of the rest."""
    scores = logits / (params.temperature or 1.0)
    if params.top_k > 0:
        scores = scores.masked_fill(scores < scores.topk(params.top_k).values[-1], -torch.inf)
    if params.top_p < 1:
        order = scores.argsort(descending=True)
        before = scores[order].softmax(-1).cumsum(-1) - scores[order].softmax(-1)
        scores = scores.index_fill(0, order[before >= params.top_p], -torch.inf)
    return scores, scores.isfinite().nonzero()[:, 0].tolist()


# ---- the weight transfer of its server


@dataclass
class NCCLTrainerInitInfo:
    master_address: str
    master_port: int
    world_size: int
    rank: int

    def __init__(self, **kwargs):
        base = "vllm/distributed/weight_transfer/base.py:TrainerInitInfo"
        rank = {"rank": kwargs.pop("rank")}
        vars(self).update(RECORD.bind("vllm/distributed/weight_transfer/nccl_engine.py:NCCLTrainerInitInfo", **kwargs))
        vars(self).update(RECORD.bind(base, **rank))


class ParamMeta:
    def __init__(self, *args):
        names = ("name", "dtype", "shape")
        given = dict(zip(names, args, strict=True))
        vars(self).update(RECORD.bind("vllm/distributed/weight_transfer/base.py:ParamMeta", **given))


class WeightSource:
    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        assert isinstance(cls.__dict__.get("metadata"), functools.cached_property), "as vLLM demands"


class HTTPVLLMWeightSyncClient:
    @RECORD.follows("vllm/distributed/weight_transfer/clients.py:HTTPVLLMWeightSyncClient")
    def __init__(self, base_url, timeout=300):
        self.base_url = base_url

    def post(self, path, body=None):
        from sspo_ext._http import call

        call(f"{self.base_url}/{path}", body or {})


class WeightTransferTrainerFactory:
    wire = []  # in NCCL's place

    @classmethod
    @RECORD.follows("vllm/distributed/weight_transfer/factory.py:WeightTransferTrainerFactory.trainer_init")
    def trainer_init(cls, init_info, *, client, source=None):
        if init_info.rank == 0:
            client.post("init_weight_transfer_engine", {"init_info": {"world_size": init_info.world_size}})
        return Transfer(init_info, client, source, cls.wire)


class Transfer:
    def __init__(self, init_info, client, source, wire):
        self.init_info, self.client, self.source, self.wire = init_info, client, source, wire

    @RECORD.follows("vllm/distributed/weight_transfer/nccl_engine.py:NCCLTrainerWeightTransferEngine.send_weights")
    def send_weights(self):
        meta, sent = self.source.metadata, [(name, weight.clone()) for name, weight in self.source.iter_full()]
        told = [(m.name, m.dtype, tuple(m.shape)) for m in meta]
        assert told == [(name, w.dtype, tuple(w.shape)) for name, w in sent], "metadata disagrees with iteration"
        if self.init_info.rank:
            return  # it has gathered, and sends nothing
        self.client.post("start_weight_update")
        self.wire.append(sent)
        names = [name for name, *_ in told]
        self.client.post("update_weights", {"update_info": {"names": names}})
        self.client.post("finish_weight_update")


def install(monkeypatch, version="0.33.0"):
    """Puts the stand-in where vLLM would be imported from."""
    modules = {
        "vllm": {"LLM": LLM, "SamplingParams": SamplingParams},
        "vllm.distributed": {},
        "vllm.distributed.weight_transfer": {
            "HTTPVLLMWeightSyncClient": HTTPVLLMWeightSyncClient, "ParamMeta": ParamMeta, "WeightSource": WeightSource,
            "WeightTransferTrainerFactory": WeightTransferTrainerFactory,
        },
        "vllm.distributed.weight_transfer.nccl_engine": {"NCCLTrainerInitInfo": NCCLTrainerInitInfo},
    }  # fmt: skip
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version if name == "vllm" else real(name))
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")  # so that what the engine sets is taken back
        monkeypatch.delenv(name)
