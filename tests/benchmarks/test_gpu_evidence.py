# SPDX-License-Identifier: Apache-2.0
"""The instruments of docs/gpu.md on inputs whose answers are known by hand, and that page's numbers against the results
it quotes.

Mutations, and what caught each: a loop walked once, a load that fills one register -> test_bytes_in_flight; the first
of a range of registers alone -> test_bytes_in_flight_amd; barriers, widths and bytes in flight not looked at ->
test_bounds_see_what_they_are_for; special functions twice as fast, one thread a program -> test_prediction_by_hand;
views counted, a gather of the whole row -> test_torch_traffic_by_hand.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from helpers.paths import ROOT

pytest.importorskip("benchmarks.kernels.torch_traffic", reason="not a checkout of the repository")
from benchmarks import records
from benchmarks.kernels import disassembly, record
from benchmarks.kernels.bounds import bounds, bounds_table
from benchmarks.kernels.torch_traffic import count_torch

RESULTS = ROOT / "benchmarks" / "results" / "gpu"


def nvidia(*lines: str) -> list[disassembly.Instruction]:
    return [disassembly.nvidia_instruction(*line.partition(" ")[::2], None) for line in lines]


LOAD_A, LOAD_B = "LDG.E.128 R4, desc[UR4][R2.64]", "LDG.E.128 R8, desc[UR4][R2.64+0x800]"


@pytest.mark.parametrize(
    ("loop", "in_flight"),
    [
        ((LOAD_A, LOAD_B, "FADD R20, R4, R8"), 32),
        ((LOAD_A, "FADD R20, R20, R7", LOAD_B, "FADD R20, R20, R8"), 16),  # the last of four registers is waited for
        ((LOAD_A, "FADD R20, R20, R12", LOAD_B, "FADD R20, R4, R8"), 32),  # R12 is nobody's
        ((LOAD_A, "FADD R20, R8, R4", LOAD_B), 32),  # the second is out until the next pass
        (("LDG.E.U16 R4, desc[UR4][R2.64]", "LDG.E.U16 R5, desc[UR4][R2.64+0x2]", "FADD R20, R4, R5"), 4),
        (("FADD R20, R4, R5",), 0),
    ],
)
def test_bytes_in_flight(loop, in_flight):
    assert disassembly.bytes_in_flight(nvidia(*loop)) == in_flight


def test_bytes_in_flight_amd():
    """Registers are named in ranges here: v[3:4] waits for the second load too."""
    text = """
\tglobal_load_dwordx4 v[0:3], v[8:9], off
\tv_add_f32_e32 v10, v2, v10
\tglobal_load_dwordx4 v[4:7], v[8:9], off offset:16
\tv_pk_add_f32 v[10:11], v[3:4], v[10:11]
\tglobal_load_dwordx4 v[12:15], v[8:9], off offset:32
\tv_add_f32_e32 v10, v13, v10
.vgpr_count: 16
"""
    assert disassembly.bytes_in_flight(disassembly.amd(text).instructions) == 16
    assert disassembly.bytes_in_flight(disassembly.amd(text.replace("v[3:4]", "v[2:3]")).instructions) == 32


def a_report(**changes):
    report = record.Report(
        "token_logp_fwd", "bfloat16", "Triton", "90", num_warps=4, registers=64, shared_bytes=0, spills=0,
        loads={16: 4}, stores={}, elements=32, loop_instructions=32 * 7, loop_special=33, loop_loads={16: 4},
        loop_stores={}, loop_bytes_in_flight=64,
    )  # fmt: skip
    for name, value in changes.items():
        setattr(report, name, value)
    report.predicted = {m.name: record.predict(report, m) for m in record.MACHINES if m.arch == "90"}
    return report


def test_prediction_by_hand():
    """H100: 3350 / 1.83 / 132 = 13.87 bytes a clock are 6.93 elements; 128 / 7 = 18.29 and 16 * 32 / 33 = 15.5 are the
    other limits; 8 programs of 128 threads with 64 bytes are 64 KiB, of 3350 GB/s * 0.8 us / 132 = 19.8 KiB."""
    p = a_report().predicted["H100"]
    assert p["bound"] == "memory" and p["share_of_bandwidth"] == 1
    assert p["issue_margin"] == pytest.approx(18.286 / 6.934, rel=1e-3)
    assert p["special_margin"] == pytest.approx(15.515 / 6.934, rel=1e-3)
    assert p["kib_in_flight"] == 64 and p["kib_needed"] == pytest.approx(19.83, rel=1e-3)
    slow = a_report(loop_instructions=32 * 40).predicted["H100"]
    assert slow["bound"] == "issue" and slow["share_of_bandwidth"] == pytest.approx(3.2 / 6.934, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "demand"),
    [
        ({"spills": 1}, "no spills"),
        ({"loop_barriers": 1}, "no barrier or shuffle"),
        ({"loop_shuffles": 2}, "no barrier or shuffle"),
        ({"loop_loads": {16: 3, 2: 8}}, "16-byte loads"),
        ({"loop_stores": {4: 1}}, "16-byte loads"),
        ({"loop_instructions": 32 * 8}, "at most 7.5 instructions"),
        ({"loop_instructions": 32 * 19}, "predicted memory-bound on H100"),
        ({"loop_bytes_in_flight": 16}, "predicted bytes in flight on H100"),
    ],
)
def test_bounds_see_what_they_are_for(changes, demand):
    assert all(bound.met for bound in bounds([a_report()]))
    missed = [bound.demand for bound in bounds([a_report(**changes)]) if not bound.met]
    assert any(name.startswith(demand) for name in missed), missed
    assert "| 0 of 1 |" in bounds_table(bounds([a_report(**changes)]))


def test_torch_traffic_by_hand():
    x = torch.zeros(4, 8, requires_grad=True)
    with count_torch() as forward:
        y = x.log_softmax(-1)
        picked = y.view(8, 4).transpose(0, 1)  # views move nothing
    assert (forward.launches, forward.loaded, forward.stored) == (1, 128, 128) and picked.shape == (4, 8)
    with count_torch() as backward:
        (d_x,) = torch.autograd.grad(y, x, torch.ones(4, 8))  # reads gradient and output
    assert backward.loaded >= 256 and backward.stored >= 128 and d_x.shape == (4, 8)
    index = torch.zeros(4, 1, dtype=torch.int64)
    with count_torch() as gathered:
        y.detach().gather(-1, index)  # as many elements as the index has
    assert (gathered.launches, gathered.loaded, gathered.stored) == (1, 4 * (4 + 8), 4 * 4)


# ---- the numbers that docs/gpu.md quotes


def test_committed_traffic_is_the_minimum():
    rows = [row for row in records.read(RESULTS / "traffic.jsonl")[1:] if row["method"].startswith("sspo_ext")]
    assert {row["V"] for row in rows} == {32000, 50257, 128256, 151936, 256000}
    assert {row["dtype"] for row in rows} == {"bfloat16", "float32"} and len(rows) == 2 * 2 * 5
    assert all(row["launches"] == 3 and 1 <= row["of_minimum"] <= 1.02 for row in rows)


def test_committed_machine_code_meets_every_bound():
    machine_code = pytest.importorskip("benchmarks.kernels.machine_code")
    reports = machine_code.load(RESULTS / "machine-code.jsonl")[1]
    ours = [report for report in reports if report.facts.startswith(("Triton", "CUDA C++"))]
    assert {r.arch for r in ours} == {"80", "90", "100", "gfx942"}
    missed = [(b.demand, b.report.kernel, b.report.arch, b.report.facts, b.got) for b in bounds(ours) if not b.met]
    assert not missed
    page = (ROOT / "docs" / "gpu.md").read_text()
    for kernel in ("token_logp_fwd", "token_logp_bwd"):
        for arch in ("90", "100"):
            rates = [
                f"{r.instructions_per_element:.2f}"
                for facts in ("Triton", "CUDA C++")
                for r in ours
                if (r.kernel, r.arch, r.facts, r.dtype) == (kernel, arch, facts, "bfloat16")
            ]
            assert f"{', '.join(rates)} (sm_{arch})" in page, (kernel, arch, rates)


def test_no_gpu_time_is_written_down():
    """Milliseconds or tokens a second on these pages would have come from nowhere: no GPU has run this.

    What arithmetic gives stands in a section that says PREDICTED, and in a column or sentence of that name.
    """
    if (RESULTS / "measured").exists():
        pytest.skip("there are measurements now")
    time = re.compile(r"\d\s*(ms|milliseconds|tokens/s|it/s)\b")
    for path in (RESULTS / "traffic.md", RESULTS / "machine-code.md"):
        assert not time.search(path.read_text()), path
    for section in (ROOT / "docs" / "gpu.md").read_text().split("\n## "):
        timed = [block for block in section.split("\n\n") if time.search(block)]
        lists = "The arithmetic of the PREDICTED" in section
        assert all("PREDICTED" in block or (lists and block.startswith("* ")) or "host" in block for block in timed)


@pytest.mark.slow
def test_peers_compile_by_their_own_launch_code(tmp_path):
    """In a process of its own: here the kernels are interpreted."""
    pytest.importorskip("triton")
    pytest.importorskip("trl.kernels")
    script = (
        "import json; from dataclasses import asdict; from benchmarks.kernels import peer_code\n"
        "peer_code.PEERS = {k: v for k, v in peer_code.PEERS.items() if k.startswith('TRL')}\n"
        "print(json.dumps([asdict(r) for r in peer_code.reports(['90'], ['bfloat16'])]))"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 4 and all(r["num_warps"] == 4 and r["registers"] > 0 for r in found)
    widths = {r["facts"].split(",")[0]: set(r["loop_loads"]) for r in found if "_forward_kernel" in r["kernel"]}
    assert "16" in widths["V = 128256"] and "16" not in widths["V = 50257"], "specialised as at a launch"
