# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks gpu` as far as it goes without a GPU: every line of it runs small on the CPU, and what it would
print beside a GPU's times comes from the predictions on disk.

Mutations, and what caught each: always the same buffer -> test_no_buffer_twice_in_a_row; unscored row's write left out
-> test_least_bytes; softcap's prediction taken for the plain one, any GPU's for this one ->
test_predictions_are_those_of_the_gpu; checks run but their result ignored -> test_red_tests_are_not_timed; marker
swapped -> test_checks_are_those_of_the_device.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("benchmarks.kernels.gpu", reason="not a checkout of the repository")
from benchmarks import records
from benchmarks.kernels import gpu, gpu_linear
from benchmarks.speed import peers
from sspo_ext import backends

needs_cpu_kernels = pytest.mark.skipif(
    backends.why_not("cpu", "cpu", torch.bfloat16) is not None, reason="the C++ module is not built"
)
QUICK = ["--device", "cpu", "--quick", "--without", "torch.compile"]


@pytest.fixture(autouse=True)
def all_peers(monkeypatch):
    monkeypatch.setattr(peers, "left_out", set())


@needs_cpu_kernels
def test_it_runs_on_the_cpu(tmp_path, capsys):
    gpu.main([*QUICK, "--no-tests", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "NO GPU times" in said and said.count("torch.compile of it was not run: left out by --without") == 2
    tables = {row["name"]: row for row in records.read(tmp_path / "tables.jsonl")}
    kernels = tables["kernels"]
    assert {(row[0], row[2], row[3]) for row in kernels["rows"]} == {
        (kernel, V, dtype)
        for kernel in ("token_logp_fwd", "token_logp_bwd")
        for V in (997, 2003)
        for dtype in ("bf16", "fp32")
    }
    assert all(row[5] > 0 and row[-1] == "-" for row in kernels["rows"]), "a CPU has no prediction"
    for head in ("trained", "frozen"):
        rows = {row[0]: row for row in tables[f"linear-{head}"]["rows"]}
        assert {"sspo_ext linear_step_pref_loss", "sspo_ext linear_step_policy_loss", "plain torch"} <= set(rows)
        assert rows["bare GEMMs of the plan"][3] == 1 and all(row[1] > 0 and row[4] > 0 for row in rows.values())
    losses = tables["loss-bf16-2003"]
    names = [row[0] for row in losses["rows"]]
    assert names[:2] == ["sspo_ext cpu, in place", "sspo_ext cpu, new buffer"] and "F.cross_entropy" in names
    assert "one copy of the logits" in names and (tmp_path / "RESULTS.md").exists()


def test_red_tests_are_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "tests_pass", lambda device: False)
    monkeypatch.setattr(gpu, "copy_bandwidth", lambda *args: pytest.fail("the clock was started"))
    with pytest.raises(SystemExit, match="the checks failed, so nothing was timed"):
        gpu.main(QUICK)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="torch sees no GPU; --device cpu --quick"):
        gpu.main([])


def test_checks_are_those_of_the_device(monkeypatch):
    seen = []

    def run(command, cwd):
        seen.append(command[command.index("-m", 3) + 1 :])
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(gpu.subprocess, "run", run)
    assert gpu.tests_pass("cuda") and gpu.tests_pass("cpu")
    assert seen == [["gpu", "-k", "cuda"], ["not gpu and not slow", "-k", "cpu"]]


def test_predictions_are_those_of_the_gpu(tmp_path, monkeypatch):
    def report(facts, machines):
        return {
            "kernel": "token_logp_fwd", "dtype": "bfloat16", "facts": facts,
            "predicted": {m: {"bound": "memory", "share_of_bandwidth": share} for m, share in machines.items()},
        }  # fmt: skip

    path = tmp_path / "machine-code.jsonl"
    records.write(
        path,
        [{"versions": ""}, report("Triton", {"H100": 1.0, "H200": 0.9}), report("CUDA C++", {"A100": 0.8}),
         report("Triton, softcap", {"H100": 0.1}), report("Triton", {}) | {"predicted": None}],
    )  # fmt: skip
    monkeypatch.setattr(gpu, "PREDICTIONS", path)
    found = gpu.predictions("NVIDIA H100 80GB HBM3")
    assert {key: value["share_of_bandwidth"] for key, value in found.items()} == {
        ("token_logp_fwd", "triton", "bfloat16"): 1.0
    }
    assert list(gpu.predictions("NVIDIA A100-SXM4-80GB")) == [("token_logp_fwd", "cuda", "bfloat16")]
    assert gpu.predictions("NVIDIA GeForce RTX 4090") == gpu.predictions("") == {}


def test_no_buffer_twice_in_a_row():
    """Each run reads other logits than the run before it, whoever ran."""
    used = []
    cases = [gpu.Timed(name, lambda i: used.append(i)) for name in ("a", "b", "c")]
    times = gpu.interleave(cases, gpu.Clock("cpu"), rounds=3, copies=2)
    assert all(a != b for a, b in zip(used, used[1:], strict=False))
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_least_bytes():
    """One read of the scored rows forward; backward, one read of them and one write of every row."""
    bench = gpu.RowKernels(gpu.LogitsSpec(4, 10, torch.bfloat16, step=2), "cpu", 1)
    assert bench.least_bytes("token_logp_fwd") == 4 * 20 and bench.least_bytes("token_logp_bwd") == (2 * 4 + 1) * 20


@needs_cpu_kernels
def test_what_is_done_is_written_before_the_next_table(tmp_path, monkeypatch):
    """A run that is cut short leaves its tables."""
    monkeypatch.setattr(gpu, "kernel_table", lambda *args: pytest.fail("cut short"))
    with pytest.raises(pytest.fail.Exception, match="cut short"):
        gpu.main([*QUICK, "--no-tests", "--out", str(tmp_path)])
    assert {row["name"] for row in records.read(tmp_path / "tables.jsonl")} == {"linear-trained", "linear-frozen"}
    assert "Linear route" in (tmp_path / "RESULTS.md").read_text()


def test_predictions_of_the_linear_route():
    """By the ledger, for the GPU's name."""
    ours, bare = gpu_linear.predicted_ms(gpu_linear.spec_of(False, "trained"), "NVIDIA H200")
    assert bare < ours < 1.15 * bare
    assert gpu_linear.predicted_ms(gpu_linear.spec_of(True, "frozen"), "NVIDIA T4") is None
