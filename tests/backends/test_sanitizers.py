# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels as a program under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer; and that these,
and the comparison with float64 inside the program, see the faults that they are there for. csrc/cpu:
test_cpu_sanitizers.py.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from helpers import cuda_emulation as build

pytestmark = pytest.mark.slow

# the emulation keeps its stacks and fibers
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "report_thread_leaks=0"}


def run(program: Path) -> tuple[int, str]:
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=600, env={**os.environ, **OPTIONS})
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def sound_program(tmp_path_factory):
    """sanitizer -> the unchanged program, built once."""
    programs = {}

    def get(sanitizer: str) -> Path:
        reason = build.why_not(sanitizer)
        if reason is not None:
            pytest.skip(reason)
        if sanitizer not in programs:
            programs[sanitizer] = build.build_checks(tmp_path_factory.mktemp(sanitizer), sanitizer)
        return programs[sanitizer]

    return get


@pytest.mark.parametrize("sanitizer", build.SANITIZERS)
def test_cuda_kernels(sound_program, sanitizer):
    status, output = run(sound_program(sanitizer))
    assert status == 0 and "0 differences" in output, output[-4000:]


FWD, BWD, STEPS, ROWS = "token_logp_fwd.cu", "token_logp_bwd.cu", "step_loss_fwd.cu", "rows.cuh"
FAULTS = {  # sanitizer, file, what stands there, what is planted, what must be told
    "label shifted by one": ("none", BWD, "to_float(row[label])", "to_float(row[(label + 1) % p.V])", "gradient"),
    "label's gradient forgotten": ("none", BWD, "if (label_is_mine) {", "if (false) {", "gradient"),
    "sums not rescaled": ("none", FWD, "sum *= exp2f(before - top);", "(void)before;", "lse"),
    "tail forgotten": ("none", ROWS, "tail = V - tail_begin;", "tail = 0;", "lse"),
    "wrong side's derivative": ("none", STEPS, "is_loser ? g.du_l : g.du_w", "g.du_w", "coef"),
    "barrier not reached by all": (
        "none",
        FWD,
        "    __syncthreads();\n    Running",
        "    if (threadIdx.x) __syncthreads();\n    Running",
        "deadlock|lse|logp",
    ),
    "group past the row's end": (
        "address",
        ROWS,
        "(V - front) / kVec;",
        "(V - front + kVec - 1) / kVec;",
        "heap-buffer-overflow",
    ),
    "load across the row's end": (
        "address",
        BWD,
        "column < before || column - before + 2 * kVec > V",
        "column < before",
        "heap-buffer-overflow",
    ),
    "groups off their boundaries": (
        "address",
        ROWS,
        "front = min(to_boundary, V);",
        "front = 0;",
        "misaligned address",
    ),
    "missing barrier": ("thread", FWD, "    __syncthreads();\n    Running", "    Running", "data race"),
    "no fence before the announcement": (
        "thread",
        FWD,
        "__threadfence();\n            is_last",
        "is_last",
        "data race",
    ),
    "no fence after it": (
        "thread",
        STEPS,
        "gridDim.x - 1;\n        __threadfence();",
        "gridDim.x - 1;",
        "data race",
    ),
    "shuffle taken for a barrier": ("thread", STEPS, "__syncwarp();", "", "data race"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(sound_program, tmp_path, fault):
    sanitizer, file, old, new, told = FAULTS[fault]
    program = build.build_with_fault(tmp_path, sanitizer, sound_program(sanitizer), file, old, new)
    status, output = run(program)
    assert status != 0 and any(word in output for word in told.split("|")), f"not caught:\n{output[-4000:]}"
