# SPDX-License-Identifier: Apache-2.0
"""`pytest benchmarks/`: the logits route under pytest-benchmark. SSPO_BENCH_FULL=1 takes real sizes."""

from __future__ import annotations

import os

import pytest
import torch

from . import logits, peers
from .problems import LogitsProblem, LogitsSpec

pytest.importorskip("pytest_benchmark")

FULL = os.environ.get("SSPO_BENCH_FULL") == "1"

ROWS, VOCAB = (1024, 128256) if FULL else (64, 8000)

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def problem(request) -> LogitsProblem:
    return LogitsProblem(LogitsSpec(ROWS, VOCAB, request.param), logits.DEVICE)


def measure(benchmark, case) -> None:
    rounds = 7 if FULL else 5
    benchmark.group = f"logits route [{ROWS} x {VOCAB}]"
    # `setup` must return None: pytest-benchmark passes on what it returns. It is not timed.
    benchmark.pedantic(case.run, setup=lambda: case.reset() and None, rounds=rounds, warmup_rounds=1)


@pytest.mark.parametrize("name", [logits.INPLACE, logits.NEW])
def test_ours(benchmark, problem, name):
    measure(benchmark, next(case for case in logits.our_cases(problem) if case.name == name))


@pytest.mark.parametrize("peer", peers.LOGITS_PEERS, ids=lambda peer: peer.name)
def test_peer(benchmark, problem, peer):
    if reason := peers.reason(peer):
        pytest.skip(reason)
    measure(benchmark, next(case for case in logits.peer_cases(problem)[0] if case.name == peer.name))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contestants_agree(dtype):
    logits.check_all(dtype)
