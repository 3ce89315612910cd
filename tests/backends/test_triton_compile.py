# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels compile ahead of time, without a GPU, to the machine code that they were written for.

benchmarks/kernels/machine_code.py reads it. The bounds on instructions are above what Triton 3.9 gives (forward 5.7,
backward 5.2 a bfloat16 element on sm_90): versions differ by a few per cent, and the mistakes that the bounds are for
cost far more. Shown to fail: rows without `tl.multiple_of` (2-byte accesses, barriers). Meant to fail: max and sum over
the block in each pass (barriers, shuffles), the label tested in the loop (instructions).
"""

import json
import os
import subprocess
import sys

import pytest
from helpers.paths import ROOT

from sspo_ext.formulas.policy import POLICY_FORMULAS
from sspo_ext.formulas.registry import PAIR_FORMULAS

pytest.importorskip("triton")
import triton
from triton.backends.amd.compiler import HIPBackend

# Triton 3.2 leaves the last step for AMD to the linker of a ROCm installation.
AMD = [] if hasattr(HIPBackend, "path_to_rocm_lld") else ["gfx942"]
# B300, whose first binary spilled; older ptxas do not know it.
NEWEST = ["103"] if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 5) else []
# What is asked of the loops: at most 7.5 and 6 instructions a bfloat16 element on sm_90, so that they are bound by
# memory on an H200.
MOST_INSTRUCTIONS = {("token_logp_fwd", "90"): 7.5, ("token_logp_bwd", "90"): 6.0}


# The step kernel's binaries differ by the formula alone. These are the longest formulas; the slow test takes all.
LONGEST_FORMULAS = ("orpo", "sigmoid_js_divergence", "nca_pair", "sigmoid_alpha_divergence")
COMPILE = """
import json, sys
from dataclasses import asdict
from benchmarks.kernels.machine_code import read, specialisations

reports = []
for kernel, dtype, arch, *formulas in json.loads(sys.argv[1]):
    for spec in specialisations(64 if arch.startswith("gfx") else 32):
        named = not formulas or spec.facts.split(",")[0] in formulas
        if spec.kernel.startswith(kernel) and spec.dtype == dtype and named:
            report = read(spec, arch)
            reports.append(asdict(report) | {"instructions_per_element": report.instructions_per_element})
print(json.dumps(reports))
"""


def compiled(*wanted: tuple[str, ...]) -> list[dict]:
    """Reports on (kernel, dtype, architecture, *formulas), made in a process of their own: this one may have imported
    the kernels as interpreted ones, and those cannot be compiled."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COMPILE, json.dumps(wanted)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def reports():
    return compiled(
        ("token_logp", "bfloat16", "90"),
        *(("token_logp", "bfloat16", arch) for arch in AMD),
        ("row_reductions", "bfloat16", "90"),
        ("step_loss", "float32", "90", *LONGEST_FORMULAS),
        ("scale_rows", "bfloat16", "90"),
        ("policy", "float32", "90"),
        *(("token_logp", "bfloat16", arch) for arch in NEWEST),
    )


def test_nothing_spills(reports):
    assert {report["arch"] for report in reports} == {"90", *AMD, *NEWEST}
    assert all(report["spills"] == 0 for report in reports)
    assert sum(report["kernel"] == "step_loss_fwd" for report in reports) == len(LONGEST_FORMULAS)
    assert sum(report["kernel"].startswith("policy") for report in reports) == len(POLICY_FORMULAS) + 1


@pytest.mark.slow
def test_no_formula_spills():
    reports = compiled(("step_loss", "float32", "90"))
    assert len(reports) == len(PAIR_FORMULAS) and all(report["spills"] == 0 for report in reports)


@pytest.mark.parametrize(
    "arch", ["90", pytest.param("gfx942", marks=pytest.mark.skipif(not AMD, reason="this Triton needs ROCm's linker"))]
)
def test_main_loops_of_the_row_kernels(reports, arch):
    loops = [report for report in reports if report["kernel"].startswith("token_logp") and report["arch"] == arch]
    assert len(loops) == 6
    for report in loops:
        assert report["elements"] == 32, report
        assert report["loop_barriers"] == report["loop_shuffles"] == 0, report
        if "aligned otherwise" not in report["facts"]:
            assert report["loop_loads"] == {"16": 4}, report
        assert report["loop_stores"] == ({"16": 4} if report["kernel"] == "token_logp_bwd" else {}), report
        bound = MOST_INSTRUCTIONS.get((report["kernel"], report["arch"]))
        if bound and not report["facts"]:
            assert report["instructions_per_element"] <= bound, report
            assert report["loop_special"] <= 33, report  # one exponential an element, and one to rescale


def test_scaling_moves_16_bytes_at_a_time(reports):
    (loop,) = [report for report in reports if report["kernel"] == "scale_rows"]
    assert set(loop["loads"]) == {"16", "4"} and set(loop["stores"]) == {"16"}, loop  # 4: the scale
    assert set(loop["loop_loads"]) == set(loop["loop_stores"]) == {"16"} and loop["spills"] == 0, loop


def test_loops_with_further_reductions(reports):
    """Entropy and sum of squares, with KL too: no spill, no barrier, 16 bytes an access.

    Triton 3.9 gives 9.4 instructions a bfloat16 element forward and 9.2 backward; 9.9 and 6.6 with KL, whose loop loads
    twice the elements. From 12.9 on, an H200's forward would be bound by instructions."""
    loops = [report for report in reports if report["kernel"].startswith("row_reductions")]
    assert len(loops) == 2 * 4
    for loop in loops:
        tensors = 2 if "KL" in loop["facts"] else 1
        assert loop["spills"] == loop["loop_barriers"] == loop["loop_shuffles"] == 0, loop
        assert loop["elements"] == 32 * tensors and loop["loop_loads"] == {"16": 4 * tensors}, loop
        assert loop["loop_stores"] == ({"16": 4} if loop["kernel"] == "row_reductions_bwd" else {}), loop
        if "softcap" not in loop["facts"]:
            assert loop["instructions_per_element"] <= 11.5, loop


def test_masked_pass_is_as_wide(reports):
    """The pass after the loop loads 16 bytes at a time too: there are as many wide loads outside the loop as in it."""
    for report in reports:
        if report["kernel"] == "token_logp_fwd" or report["facts"] == "":
            if report["kernel"].startswith("token_logp"):
                assert report["loads"]["16"] >= 8, report
