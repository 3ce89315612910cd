# SPDX-License-Identifier: Apache-2.0
"""A row has the same bits alone, among others, and on any number of threads.

Trainer and rollout, or two batch sizes, then give the same log-prob for the same logits. It is a promise of the row
kernels; a GEMM that makes the logits may choose its tiling by size and gives none. On CPUs it holds wherever the row
lies in memory. Triton walks a row from its own 16-byte boundaries, so there it holds for rows that lie alike in their
16 bytes: in the linear route's buffer all do, as in logits whose V is a multiple of 8. The CUDA C++ kernels share a row
among blocks by the number of rows, so they do not give it (csrc/cuda/launch.h, `row_splits`).

How many Triton programs share a row does not show either: test_programs_of_a_row_do_not_show in test_triton_rows.py.
Shown to fail: Triton rows that begin anywhere (their last bits differ).
"""

import pytest
import torch
from helpers.cpu_rows import ISAS

from sspo_ext.backends import cpu
from sspo_ext.backends import triton as triton_backend

CASES = [(torch.float32, 5), (torch.float32, 9001), (torch.bfloat16, 33), (torch.bfloat16, 12289), (torch.float16, 700)]


def batch(dtype, V, anywhere=True):
    """(1, 7, V) logits, rows of which begin anywhere in their 16 bytes, or all on a boundary; labels (7,)."""
    g = torch.Generator().manual_seed(V)
    padded, first = (V + 3, 1) if anywhere else (-(-V // 8) * 8, 0)
    wide = torch.randn(1, 7, padded, generator=g).mul(4).to(dtype)
    return wide[..., first : first + V], torch.randint(V, (7,), generator=g)


def check(kernels, dtype, V, anywhere=True):
    logits, labels = batch(dtype, V, anywhere)
    rows = torch.arange(7)
    whole = kernels.token_logp_fwd(logits, rows, labels, 0.7, 0.0)
    for n in range(7):
        alone = kernels.token_logp_fwd(logits[:, n : n + 1].clone(), rows[:1], labels[n : n + 1], 0.7, 0.0)
        assert all(torch.equal(x[n : n + 1], y) for x, y in zip(whole, alone, strict=True)), n
    order = torch.tensor([3, 0, 6])
    some = kernels.token_logp_fwd(logits, order, labels[order], 0.7, 0.0)
    assert all(torch.equal(x[order], y) for x, y in zip(whole, some, strict=True))
    out = torch.empty(logits.shape, dtype=dtype)
    coef = torch.linspace(-1, 1, 7)
    kernels.token_logp_bwd(logits, rows.int(), labels, whole[1], coef, None, 0.7, 0.0, out)
    for n in range(7):
        part = torch.empty(1, 1, V, dtype=dtype)
        one = (logits[:, n : n + 1].clone(), rows[:1].int(), labels[n : n + 1], whole[1][n : n + 1], coef[n : n + 1])
        kernels.token_logp_bwd(*one, None, 0.7, 0.0, part)
        assert torch.equal(out[:, n : n + 1], part), n


@pytest.mark.parametrize(("dtype", "V"), CASES)
@pytest.mark.parametrize("isa", ISAS)
def test_cpu(monkeypatch, isa, dtype, V):
    monkeypatch.setenv("SSPO_CPU_ISA", isa)
    check(cpu, dtype, V)
    logits, labels = batch(dtype, V)
    many = logits.repeat(1, 40, 1)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(cpu.token_logp_fwd(many, torch.arange(280), labels.repeat(40), 0.7, 0.0))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.interpreted
@pytest.mark.parametrize(("dtype", "V"), CASES)
def test_triton(dtype, V):
    check(triton_backend, dtype, V, anywhere=False)
