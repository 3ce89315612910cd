# SPDX-License-Identifier: Apache-2.0
"""A stand-in for `vllm serve` 0.33, on the loopback. Its routes take and give the fields of vLLM's recorded ones."""

import contextlib
import os
import threading
from urllib.parse import parse_qsl, urlsplit

from .json_server import json_server
from .vllm_double import LLM, RECORD, SamplingParams, WeightTransferTrainerFactory

_WIRE = "vllm/entrypoints/scale_out/token_in_token_out/protocol.py"
_RL = "vllm/entrypoints/rl/online/api_router.py"
_DEV = "vllm/entrypoints/serve/dev/server_info/api_router.py"
CONFIG = {
    "model_config": {"logprobs_mode": "processed_logprobs", "generation_config": "vllm"},
    "weight_transfer_config": {"backend": "nccl"},
}


class Refused(Exception):
    """(status, message)"""


class Server:
    def __init__(self, config, routes, **options):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # of no meaning here, but the stand-in asks for it
        self.llm, self.config, self.routes = LLM(model="policy", **options), config, routes
        self.paused, self.updating, self.log, self.lock = False, None, [], threading.Lock()
        self.version = "0.33.0"

    def answer(self, path, query, body):
        """The JSON of an answer; everything but reading the version is written into `log`."""
        if path in self.routes["missing"]:
            raise Refused(404, "Not Found")
        if path != "/inference/v1/generate":
            self.log.append(path + (f" {query['mode']}" if "mode" in query else ""))
        if path == "/version":
            return {"version": self.version}
        if path == "/server_info":
            found = RECORD.bind(f"{_DEV}:show_server_info", None, **query)
            return {"vllm_config": str(self.config) if found["config_format"] == "text" else self.config}
        if path == "/get_world_size":
            RECORD.bind(f"{_RL}:get_world_size", None, **query)
            return {"world_size": 2}
        if path in ("/pause", "/resume"):
            return self._pause(path, query)
        if path == "/inference/v1/generate":
            with self.lock:
                return self._generate(body)
        return self._update(path, body)

    def _pause(self, path, query):
        name = "pause_generation" if path == "/pause" else "resume_generation"
        found = RECORD.bind(f"{_RL}:{name}", None, **query)
        self.paused = path == "/pause"
        if self.paused and found["clear_cache"]:
            self.llm.reset_prefix_cache()
        return {"status": path[1:] + "d"}

    def _update(self, path, body):
        if path == "/init_weight_transfer_engine":
            assert body["init_info"]["world_size"] == 3
        elif path == "/start_weight_update":
            assert self.updating is None
            self.updating = []
        elif path == "/update_weights":
            self.updating.append(WeightTransferTrainerFactory.wire.pop())
            assert [name for name, _ in self.updating[-1]] == body["update_info"]["names"]
        elif path == "/finish_weight_update":
            (weights,), self.updating = self.updating, None
            assert self.paused, "somebody may be asking meanwhile"
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            self.llm.stale = bool(self.llm.seen)
        else:
            raise Refused(404, "Not Found")
        return {"message": "done"}

    def _generate(self, body):
        if self.paused:
            raise Refused(503, "paused")
        try:
            RECORD.bind(f"{_WIRE}:GenerateRequest", **body)
            params = SamplingParams(**body["sampling_params"])
        except TypeError as error:
            raise Refused(400, str(error)) from error
        (found,) = self.llm.generate([{"prompt_token_ids": body["token_ids"]}], [params], use_tqdm=False)
        output = found.outputs[0]
        content = []
        for token, at in zip(output.token_ids, output.logprobs, strict=True):
            top = [dict(RECORD.bind(f"{_WIRE}:GenerateLogProb", token_id=t, logprob=x.logprob)) for t, x in at.items()]
            base = RECORD.bind(f"{_WIRE}:GenerateLogProb", token_id=token, logprob=at[token].logprob)
            content.append({**base, **RECORD.bind(f"{_WIRE}:GenerateLogProbsContent", top_logprobs=top)})
        choice = RECORD.bind(
            f"{_WIRE}:GenerateChoiceBase", index=0, token_ids=list(output.token_ids),
            sampling_mask=output.sampling_mask and output.sampling_mask.token_ids,
        )  # fmt: skip
        logprobs = dict(RECORD.bind(f"{_WIRE}:GenerateLogProbs", content=content))
        return {"choices": [{**choice, "logprobs": logprobs}]}


@contextlib.contextmanager
def serving(config=CONFIG, missing=(), **options):
    """(url, Server) of a server that runs meanwhile. `missing`: paths that it has not got; `options`: of its LLM."""
    state = Server(config, {"missing": missing}, **options)

    def respond(path, body):
        parts = urlsplit(path)
        try:
            return 200, state.answer(parts.path, dict(parse_qsl(parts.query)), body)
        except Refused as error:
            return error.args[0], {"error": error.args[1]}
        except Exception as error:
            return 500, {"error": repr(error)}

    with json_server(respond) as url:
        yield url, state
