# SPDX-License-Identifier: Apache-2.0
"""csrc/cpu under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer: as a program of checks, and as the
module in Python, by the module's own tests. Each planted fault is seen.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import cpu_checks as build
from helpers.cuda_emulation import why_not
from helpers.paths import ROOT

from sspo_ext.backends import cpu

pytestmark = pytest.mark.slow

OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0"}  # Python keeps what it has allocated


def run(program: Path, *arguments: str) -> tuple[int, str]:
    command = [str(program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, **OPTIONS})
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def sound_program(tmp_path_factory):
    """sanitizer -> the unchanged program, built once."""
    programs = {}

    def get(sanitizer: str) -> Path:
        reason = why_not(sanitizer)
        if reason is not None:
            pytest.skip(reason)
        if sanitizer not in programs:
            programs[sanitizer] = build.build_checks(tmp_path_factory.mktemp(sanitizer), sanitizer)
        return programs[sanitizer]

    return get


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_cpu_kernels(sound_program, sanitizer):
    """Every instruction set that this machine can run, by three threads."""
    status, output = run(sound_program(sanitizer))
    assert status == 0 and "baseline" in output and "0 differences" in output, output[-4000:]
    assert (cpu.product_why_not() is None) == ("\nproduct\n" in output), output[-4000:]


ROW, STEPS, LOGP, REDUCTIONS = "row.h", "step_loss.cpp", "token_logp.h", "row_reductions.h"
PRODUCT = "isa/avx512_bf16.cpp"
OVERFLOW = "heap-buffer-overflow|SEGV"
FAULTS = {  # file, what stands there, what is planted, what must be told
    "label past the row": (ROW, "label >= 0 && label < V", "label >= 0", f"labels, |{OVERFLOW}"),
    "label below 0": (ROW, "label >= 0 && label < V", "label < V", f"labels, |{OVERFLOW}"),
    "row past the logits": (
        ROW, "position >= 0 && position < l.positions", "position >= 0", f"out of range|{OVERFLOW}",
    ),
    "row below 0": (
        ROW, "position >= 0 && position < l.positions", "position < l.positions", f"out of range|{OVERFLOW}",
    ),
    "row_of past the rows": (ROW, "row >= 0 && row < args.N", "row >= 0", f"gradient of no row|{OVERFLOW}"),
    "row_of below -1": (ROW, "row >= 0 && row < args.N", "row == -1 || row < args.N", f"no row|{OVERFLOW}"),
    "step begins outside": (
        STEPS, "std::clamp<int64_t>(a.step_offsets[k], 0, a.N)", "(int64_t)a.step_offsets[k]", OVERFLOW,
    ),
    "step ends outside": (
        STEPS, "std::clamp<int64_t>(a.step_offsets[k + 1], row_begin(k), a.N)", "(int64_t)a.step_offsets[k + 1]",
        OVERFLOW,
    ),
    "winner below 0": (STEPS, "w < 0 || w >= a.S", "w >= a.S", OVERFLOW),
    "winner past the steps": (STEPS, "w < 0 || w >= a.S", "w < 0", OVERFLOW),
    "loser below 0": (STEPS, "l < 0 || l >= a.S", "l >= a.S", OVERFLOW),
    "loser past the steps": (STEPS, "l < 0 || l >= a.S", "l < 0", OVERFLOW),
    "adjacency begins outside": (
        STEPS, "std::clamp<int64_t>(a.adj_offsets[k], 0, end)", "a.adj_offsets[k]", OVERFLOW,
    ),
    "adjacency ends outside": (
        STEPS, "std::clamp<int64_t>(a.adj_offsets[k + 1], 0, 2 * a.P)", "a.adj_offsets[k + 1]", OVERFLOW,
    ),
    "adjacent pair below 0": (STEPS, "entry < 0 || entry >= 2 * a.P", "entry >= 2 * a.P", f"coef|{OVERFLOW}"),
    "adjacent pair past the pairs": (STEPS, "entry < 0 || entry >= 2 * a.P", "entry < 0", f"coef|{OVERFLOW}"),
    "wrong side's derivative": (STEPS, "entry % 2 ? grads", "entry % 2 == 0 ? grads", "coef"),
    "sums not rescaled": (
        LOGP, "if (!first && m > shift) sum *= exp2(e.exponent((double)shift - m));", ";", "lse|logp",
    ),
    "a late tile's sum not looked at": (LOGP, "if (first || !(part < kRescale)) {", "if (first) {", "lse|logp"),
    "entropy's sum not moved": (REDUCTIONS, "et = f * (et - d * e);", "", "entropy"),
    "squares not moved": (REDUCTIONS, "ee *= f * f;", "", "sum_p2"),
    "KL's sum not moved": (REDUCTIONS, "srt += d * s;", "", "kl"),
    "KL's sum not moved with the reference": (REDUCTIONS, "srt = f * (srt - d * s);", "", "kl"),
    "tail of the sum forgotten": (LOGP, "        sum[0] += index.a < rest ? term(v.a) : F{};\n", "", "lse|logp"),
    "tail of the gradient too long": (
        LOGP, "partial(i, n - i < kPair ? n - i : kPair)", "partial(i, kPair)", f"gradient|{OVERFLOW}",
    ),
    "streaming stores off their boundaries": (LOGP, "i = before < n ? before : n;", "i = 0;", "SEGV|misaligned"),
    "last block past the rows": (
        "dispatch.cpp", "work(b * block, std::min(count, (b + 1) * block))", "work(b * block, (b + 1) * block)",
        OVERFLOW,
    ),
    "product: a row past the last pair": (PRODUCT, "if (2 * p + 1 == n)", "if (false)", f"product|{OVERFLOW}"),
    "product: columns past the last": (
        PRODUCT, "left >= kLanes ? 0xffff : left <= 0 ? 0 : (1 << left) - 1", "0xffff", f"product|{OVERFLOW}",
    ),
    "product: rows past the last": (PRODUCT, "if (rows - row >= kRows)", "if (row >= 0)", f"product|{OVERFLOW}"),
    "product: hidden past the last column": (
        PRODUCT, "a.H - column < kColumns ? a.H - column : kColumns", "kColumns", f"product|{OVERFLOW}",
    ),
    "product: a later block of pairs overwrites": (PRODUCT, "a.first && first == 0", "a.first", "product"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(sound_program, tmp_path, fault):
    file, old, new, told = FAULTS[fault]
    if file == PRODUCT and cpu.product_why_not() is not None:
        pytest.skip(str(cpu.product_why_not()))
    program = build.build_with_fault(tmp_path, "address", sound_program("address"), file, old, new)
    status, output = run(program, "baseline")
    assert status != 0 and any(word in output for word in told.split("|")), f"not caught:\n{output[-4000:]}"


def test_a_counter_that_is_not_atomic_is_caught(sound_program, tmp_path):
    """Two threads could take the same block: they would write the same numbers, and no comparison would see it."""
    old = "std::atomic<int64_t> next{0};"
    new = "struct { int64_t n = 0; int64_t fetch_add(int64_t k) { n += k; return n - k; } } next;"
    sound = sound_program("thread")
    program = build.build_with_fault(tmp_path, "thread", sound, "dispatch.cpp", old, new)
    status, output = run(program, "baseline")
    assert status != 0 and "data race" in output, f"not caught:\n{output[-4000:]}"


# The tests that call the module directly, under a module built with the sanitizers. `-s`: what a sanitizer prints
# before it ends the process must not stay in pytest's capture.
PYTHON = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("sspo_ext._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["sspo_ext._C"] = module
import pytest
sys.exit(pytest.main([*sys.argv[2:], "-q", "-x", "-s", "-n", "0", "-p", "no:cacheprovider", "-p", "no:faulthandler"]))
"""


@pytest.fixture(scope="module")
def sanitized_module(tmp_path_factory):
    pytest.importorskip("pybind11")
    if why_not("address") is not None:
        pytest.skip(why_not("address"))
    if build.runtime_libraries() is None:
        pytest.skip("no shared runtime of AddressSanitizer to load into Python")
    return build.build_module(tmp_path_factory.mktemp("module"))


def run_tests(module: Path, *arguments: str) -> tuple[int, str]:
    preload = " ".join(build.runtime_libraries() or [])
    environment = {**os.environ, **OPTIONS, "LD_PRELOAD": preload, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PYTHON, str(module), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    "file",
    ["test_cpu_edges", "test_cpu_step_loss", "test_cpu_huge_logits", "test_cpu_product", "test_label_contract"],
)
def test_binding_and_wrapper(sanitized_module, file):
    status, output = run_tests(sanitized_module, f"tests/backends/{file}.py")
    assert status == 0 and " passed" in output, output[-4000:]
