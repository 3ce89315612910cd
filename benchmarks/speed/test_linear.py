# SPDX-License-Identifier: Apache-2.0
"""`pytest benchmarks/`: the linear route under pytest-benchmark. SSPO_BENCH_FULL=1 takes real sizes."""

from __future__ import annotations

import os

import pytest
import torch

from . import linear, peers
from .measure import Case
from .problems import LinearProblem
from .tables import Settings

pytest.importorskip("pytest_benchmark")

FULL = os.environ.get("SSPO_BENCH_FULL") == "1"

SETTINGS = Settings(quick=not FULL, rounds=None, limit_s=300)

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def problem(request) -> LinearProblem:
    return LinearProblem(linear.base_spec(SETTINGS, request.param, step=None), linear.DEVICE)


def measure(benchmark, case: Case) -> None:
    benchmark.group = "linear route, trained head, reference included"
    benchmark.pedantic(case.run, setup=lambda: case.reset() and None, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("peer", [peers.OURS, *peers.LINEAR_PEERS], ids=lambda peer: peer.name)
def test_contestant(benchmark, problem, peer):
    if reason := peers.reason(peer, problem):
        pytest.skip(reason)
    measure(benchmark, linear.cases_for(problem, [peer])[0])


def test_bare_gemms(benchmark, problem):
    measure(benchmark, Case(linear.FLOOR, peers.BareGemms(problem)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", ["trained", "frozen"])
@pytest.mark.parametrize("ref", ["live", "cached"])
def test_contestants_agree(dtype, head, ref):
    linear.check(linear.base_spec(SETTINGS, dtype, head=head, ref=ref))
