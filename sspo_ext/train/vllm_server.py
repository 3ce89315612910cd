# SPDX-License-Identifier: Apache-2.0
"""vLLM as rollout engine on other GPUs: `vllm serve`, asked over HTTP, with weights handed over by NCCL.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --enable-scale-out --weight-transfer-config '{"backend": "nccl"}' \
        --logprobs-mode processed_logprobs --generation-config vllm

Nothing of ours runs in the server. Its tensor parallelism (`--tensor-parallel-size`), its prefix cache and its memory
are its own matter. The trainer's machine needs vLLM 0.33 as well, whose end of the weight transfer it is.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from .._checks import check_count
from .._http import call, short
from .._versions import check_version
from .policy_weights import policy_weights, weight_shapes
from .vllm_requests import VERSION, Answer, Asked, VLLMRequests

_WANTED = {"logprobs_mode": "processed_logprobs", "generation_config": "vllm"}


class VLLMServer(VLLMRequests):
    """Completes prompts with a vLLM server, to which it hands the policy's weights.

    All processes of a trainer ask one server, each for its own prompts. The first one sends the weights, whole.

    Args:
        url: Where the server is, such as "http://10.0.0.2:8000".
        address: This machine's, at which the server's workers find the trainer's first process. NCCL goes over the
            network that it belongs to.
        port: A free port of this machine for that.
        workers: Requests at once; vLLM makes batches of them.
        timeout: Seconds until a call fails.
        headers: Of every call, such as {"Authorization": ...}. vLLM's own calls for the weights have none.

    Raises:
        ImportError: vLLM is not installed here, or in another version.
        ConnectionError: The server does not answer, or lacks an endpoint, which the message names.
        ValueError: The server has another version, or settings under which its log-probs are not those of sampling.
    """

    def __init__(
        self,
        url: str,
        *,
        address: str = "127.0.0.1",
        port: int = 29600,
        workers: int = 128,
        timeout: float = 600.0,
        headers: dict[str, str] | None = None,
    ):
        check_version("vllm", VERSION)
        check_count("workers", workers)
        self.url, self.workers, self.timeout = url.rstrip("/"), workers, timeout
        self.address, self.port, self.headers = address, port, headers or {}
        self._transfer: Any = None
        self._check_server()

    def _check_server(self) -> None:
        found = self._call("/version")["version"]
        if found.split(".")[:2] != VERSION.split("."):
            raise ValueError(f"{self.url}: expected vLLM {VERSION}, got {found}")
        config = self._call("/server_info?config_format=json", "start it with VLLM_SERVER_DEV_MODE=1")["vllm_config"]
        for name, wanted in _WANTED.items():
            if config["model_config"][name] != wanted:
                option = f"--{name.replace('_', '-')} {wanted}"
                raise ValueError(f"{self.url}: expected a server with {option}, got {config['model_config'][name]!r}")
        if (config["weight_transfer_config"] or {}).get("backend") != "nccl":
            raise ValueError(
                f'{self.url}: expected a server with --weight-transfer-config \'{{"backend": "nccl"}}\', '
                f"got {config['weight_transfer_config']}"
            )

    def load_weights(self, model: nn.Module) -> None:
        """See `VLLMRequests.load_weights`. All processes call it, with the same weights."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        self._wait_for_all()  # every process has the answers to what it asked of the weights before
        if self._transfer is None:
            self._transfer = self._connected(rank, model)
        self._transfer.source.model = model
        if rank == 0:
            self._call("/pause?mode=wait", body={})  # what is cached is dropped with it
        try:
            self._transfer.send_weights()
        finally:
            if rank == 0:
                self._call("/resume", body={})
        self._wait_for_all()  # nobody asks before the weights are there

    @staticmethod
    def _wait_for_all() -> None:
        if dist.is_initialized():
            dist.barrier()

    def _connected(self, rank: int, model: nn.Module) -> Any:
        """VLLM's sending end; with it the first process and the server's workers have met."""
        from vllm.distributed.weight_transfer import (  # pyright: ignore[reportMissingImports]
            HTTPVLLMWeightSyncClient,
            WeightTransferTrainerFactory,
        )
        from vllm.distributed.weight_transfer.nccl_engine import (  # pyright: ignore[reportMissingImports]
            NCCLTrainerInitInfo,
        )

        workers = self._call("/get_world_size")["world_size"]
        init_info = NCCLTrainerInitInfo(
            master_address=self.address, master_port=self.port, world_size=1 + workers, rank=rank
        )
        client = HTTPVLLMWeightSyncClient(self.url, timeout=self.timeout)
        return WeightTransferTrainerFactory.trainer_init(init_info, client=client, source=_source()(model))

    def _ask(self, asked: Sequence[Asked]) -> list[Answer]:
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self._generate, asked))

    def _generate(self, asked: Asked) -> Answer:
        prompt, params = asked
        body = {"token_ids": prompt, "sampling_params": params}
        answer = self._call("/inference/v1/generate", "start it with --enable-scale-out", body)
        try:
            (choice,) = answer["choices"]
            logps = [
                {one["token_id"]: one["logprob"] for one in (at, *at["top_logprobs"])}
                for at in choice["logprobs"]["content"]
            ]
            return Answer(choice["token_ids"], logps, choice["sampling_mask"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.url}: expected tokens and log-probs in the answer, got {short(answer)} ({error!r})"
            ) from error

    def _call(self, path: str, hint: str = "", body: Any = None) -> Any:
        try:
            return call(self.url + path, body, headers=self.headers, timeout=self.timeout)
        except ConnectionError as error:
            if hint and ": 404 " in str(error):
                raise ConnectionError(f"{error}; {hint}") from error
            raise


@functools.cache
def _source() -> type:
    """A class of vLLM's kind, which can be made only where vLLM is."""
    from vllm.distributed.weight_transfer import ParamMeta, WeightSource  # pyright: ignore[reportMissingImports]

    class PolicySource(WeightSource):
        """The policy's weights: what is sent first is what each is called, then the weights, one by one."""

        def __init__(self, model: nn.Module):
            self.model = model

        @functools.cached_property
        def metadata(self) -> list[Any]:
            return [ParamMeta(name, dtype, shape) for name, dtype, shape in weight_shapes(self.model)]

        def iter_full(self) -> Iterator[tuple[str, Tensor]]:
            return policy_weights(self.model)

    return PolicySource
