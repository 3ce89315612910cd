"""The C++ and CUDA kernels as programs under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer; and that
these, and the comparison with float64 inside the programs, see the faults that they are there for.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from cuda_emulation import build

# leaks of the interpreter's making are none of ours, and the emulation keeps its fibers
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "report_thread_leaks=0"}
HERE = Path(__file__).parent


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


FAULTS = {
    "label shifted by one": ("none", "token_logp_bwd.cu", "to_float(row[label])", "to_float(row[(label + 1) % p.V])", "gradient"),
    "label not the last to be written": ("none", "token_logp_bwd.cu", "if (label_is_mine) {", "if (false) {", "gradient"),
    "sums not rescaled": ("none", "token_logp_fwd.cu", "sum *= exp2f(before - top);", "(void)before;", "lse"),
    "tail forgotten": ("none", "rows.cuh", "tail = V - tail_begin;", "tail = 0;", "lse"),
    "wrong side's derivative": ("none", "step_loss_fwd.cu", "is_loser ? g.du_l : g.du_w", "g.du_w", "coef"),
    "group past the row's end": ("address", "rows.cuh", "(V - head) / kVec;", "(V - head + kVec - 1) / kVec;", "heap-buffer-overflow"),
    "load across the row's end": (
        "address", "token_logp_bwd.cu", "column < before || column - before + 2 * kVec > V", "column < before", "heap-buffer-overflow",
    ),
    "groups not on 16-byte boundaries": ("address", "rows.cuh", "head = min(to_boundary, V);", "head = 0;", "misaligned address"),
    "missing barrier": ("thread", "token_logp_fwd.cu", "    __syncthreads();\n    Running", "    Running", "data race"),
    "partial not fenced before it is announced": ("thread", "token_logp_fwd.cu", "__threadfence();\n            is_last", "is_last", "data race"),
    "losses read without a fence": (
        "thread", "step_loss_fwd.cu", "gridDim.x - 1;\n        __threadfence();", "gridDim.x - 1;", "data race",
    ),
    "a shuffle taken for a barrier": ("thread", "step_loss_fwd.cu", "__syncwarp();", "", "data race"),
    "barrier not reached by all": (
        "none", "token_logp_fwd.cu", "    __syncthreads();\n    Running", "    if (threadIdx.x) __syncthreads();\n    Running", "deadlock|lse|logp",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(sound_program, tmp_path, fault):
    sanitizer, file, old, new, told = FAULTS[fault]
    program = build.build_with_fault(tmp_path, sanitizer, sound_program(sanitizer), file, old, new)
    status, output = run(program)
    assert status != 0 and any(word in output for word in told.split("|")), f"not caught:\n{output[-4000:]}"
