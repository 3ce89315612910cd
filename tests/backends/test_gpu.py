# SPDX-License-Identifier: Apache-2.0
"""Every backend against float64 on a GPU, at real sizes: `pytest -m gpu` needs a GPU and nothing else. The same checks
run small on the CPU in the default tests, so that they are known to work before a GPU meets them.

Mutations of the CPU backend, and what caught each: log-probs off by 1e-4; the last, unscored row written; label + 1 in
the backward; one element of a row that is not compared off by 0.1 -> test_log_probs_and_gradient. A gradient that
differs from call to call -> test_same_bits_every_time. A gradient 1% too large -> test_losses, test_linear_route.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.gpu import Size, check, make_logits, needs_memory, packed_layout

from sspo_ext import backends
from sspo_ext.layout.pairs import StepPairs
from sspo_ext.losses.logps import linear_step_logps, step_logps
from sspo_ext.losses.policy import linear_step_policy_loss
from sspo_ext.losses.pref import linear_step_pref_loss, step_pref_loss

VOCABULARIES = (32000, 50257, 128256, 151936, 256000)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIZES = {
    "cuda": [
        *(Size(1024, V, dtype) for V in VOCABULARIES for dtype in (BF16, FP32)),
        Size(1024, 50257, FP16),
        Size(512, 128256, BF16, inplace=True),
        Size(512, 50257, BF16, softcap=30.0, temperature=0.7),
        # fewer rows than multiprocessors: the vocabulary is shared out
        *(Size(rows, 256000, BF16) for rows in (1, 3, 33)),
        Size(7, 50257, FP32),
        # more than 2^31 elements, in place: 4.3 GB
        Size(17000, 128256, BF16, inplace=True),
    ],
    "cpu": [
        Size(5, 2003, FP32),
        Size(33, 1031, BF16),
        Size(9, 997, FP16, inplace=True),
        Size(9, 997, FP32, softcap=3.0, temperature=0.7),
    ],
}
HEADS = ("sigmoid", "hinge", "ipo", "simpo")


def usable(device: str, dtype: torch.dtype = BF16) -> list[str]:
    """Fused backends; on the CPU not interpreted Triton, which has tests of its own."""
    names = [n for n in backends.BACKENDS if n != "reference" and backends.why_not(n, device, dtype) is None]
    return [n for n in names if device == "cuda" or n == "cpu"]


def cases(values):
    """(device, backend, value) for each device, with what cannot run here skipped by name."""
    made = []
    for device in ("cuda", "cpu"):
        marks = [pytest.mark.gpu] if device == "cuda" else []
        absent = device == "cuda" and not torch.cuda.is_available()
        names = ["triton", "cuda"] if absent else usable(device)
        for name in names or ["none"]:
            for value in values[device] if isinstance(values, dict) else values:
                reason = "no GPU" if absent else "no fused backend can run here" if name == "none" else None
                skip = [pytest.mark.skip(reason=reason)] if reason else []
                made.append(pytest.param(device, name, value, marks=marks + skip, id=f"{device}-{name}-{value}"))
    return made


@pytest.mark.parametrize(("device", "name", "size"), cases(SIZES))
def test_log_probs_and_gradient(device, name, size):
    check(size, name, device)


SMALL = {"cuda": [Size(300, 50257)], "cpu": [Size(40, 501)]}


@pytest.mark.parametrize(("device", "name", "size"), cases(SMALL))
def test_same_bits_every_time(device, name, size):
    layout, logits = packed_layout(size.rows, size.vocab).to(device), make_logits(size, device)

    def run():
        leaf = logits.detach().clone().requires_grad_()
        out = step_logps(leaf, layout, backend=name)
        out.sums.square().sum().backward()
        return out.tokens.detach(), leaf.grad

    first = run()
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize(("device", "name", "head"), cases(HEADS))
def test_losses(device, name, head):
    """Loss, metrics and gradient of a fused backend beside the reference's, float32."""
    size = Size(256, 32000, FP32) if device == "cuda" else Size(64, 211, FP32)
    layout = packed_layout(size.rows, size.vocab, step=8)
    half = layout.num_steps // 2
    index = torch.stack([torch.arange(half), torch.arange(half) + half], 1)
    pairs = StepPairs.from_index(layout, index).to(device)
    layout, logits = layout.to(device), make_logits(size, device)
    ref = None if head == "simpo" else torch.randn(layout.num_steps, device=device)

    def run(backend):
        leaf = logits.detach().clone().requires_grad_()
        out = step_pref_loss(leaf, layout, pairs, ref=ref, loss_type=head, backend=backend)
        out.loss.backward()
        return [out.loss.detach(), *out.metrics.values(), leaf.grad]

    for got, expected in zip(run(name), run("reference"), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(("device", "name", "trained"), cases([True, False]))
def test_linear_route(device, name, trained):
    """Hidden states and head against float64 reference, with a frozen and a trained head."""
    V, H, rows = (32000, 512, 512) if device == "cuda" else (211, 16, 48)
    needs_memory(device, 4 << 30)
    layout = packed_layout(rows, V, step=8)
    half = layout.num_steps // 2
    pairs = StepPairs.from_index(layout, torch.stack([torch.arange(half), torch.arange(half) + half], 1)).to(device)
    layout = layout.to(device)
    generator = torch.Generator(device).manual_seed(2)
    hidden = torch.randn(rows + 1, H, generator=generator, device=device)
    weight = torch.randn(V, H, generator=generator, device=device) * H**-0.5

    def run(backend, dtype):
        h, w = (tensor.detach().clone().to(dtype) for tensor in (hidden, weight))
        h.requires_grad_(), w.requires_grad_(trained)
        linear_step_pref_loss(h, w, layout, pairs, backend=backend, chunk_bytes=8 << 20).loss.backward()
        return [h.grad, w.grad] if trained else [h.grad]

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        got, expected = run(name, FP32), run("reference", torch.float64)
    finally:
        torch.set_float32_matmul_precision(precision)
    for ours, truth in zip(got, expected, strict=True):
        error = (ours.double() - truth).norm() / truth.norm()
        assert error < 1e-5, error


POLICIES = {
    "reinforce": {},
    "ppo": {"loss_type": "ppo", "epsilon": 0.5, "kl_coef": 0.1},
    "gspo": {"loss_type": "ppo", "importance_sampling_level": "sequence", "aggregation": "sequence", "epsilon": 0.9},
    "steps with entropy": {"loss_type": "cispo", "importance_sampling_level": "step", "entropy_coef": 0.05},
}


@pytest.mark.parametrize(("device", "name", "policy"), cases(tuple(POLICIES)))
def test_linear_policy(device, name, policy):
    """Loss and gradients in float32 against the float64 reference: frozen and trained head, idle rows, small chunks."""
    V, H, rows = (32000, 512, 512) if device == "cuda" else (211, 16, 48)
    needs_memory(device, 4 << 30)
    if name == "cuda" and POLICIES[policy].get("entropy_coef"):
        pytest.skip("the CUDA C++ backend has no entropy")
    layout = packed_layout(rows, V, step=8).to(device)
    generator = torch.Generator(device).manual_seed(3)
    hidden = torch.randn(rows + 1, H, generator=generator, device=device)
    weight = torch.randn(V, H, generator=generator, device=device) * H**-0.5
    advantages = torch.linspace(-1, 1, layout.num_steps)
    advantages[:2] = 0
    tokens = step_logps((hidden.double() @ weight.double().T), layout, backend="reference").tokens
    old, ref = (tokens + 0.1 * torch.randn(rows, generator=generator, device=device) for _ in range(2))
    options = {**POLICIES[policy], "ref": ref}
    if "loss_type" in options:
        options["old"] = old

    def run(backend, dtype, trained):
        h, w = (tensor.detach().clone().to(dtype) for tensor in (hidden, weight))
        h.requires_grad_(), w.requires_grad_(trained)
        out = linear_step_policy_loss(h, w, layout, advantages, backend=backend, chunk_bytes=16 << 20, **options)
        out.loss.backward()
        return [out.loss.detach(), out.tokens, h.grad, *([w.grad] if trained else [])]

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        found = [(run(name, FP32, trained), run("reference", torch.float64, trained)) for trained in (False, True)]
    finally:
        torch.set_float32_matmul_precision(precision)
    for ours, truth in (pair for run in found for pair in zip(*run, strict=True)):
        error = (ours.double() - truth).norm() / truth.norm()
        assert error < 1e-5, error


@pytest.mark.parametrize(("device", "name", "dtype"), cases([BF16, FP32]))
def test_log_probs_do_not_depend_on_the_batch(device, name, dtype):
    """`batch_invariant`: rows at every place of a tile, alone, and at another budget."""
    if name == "cuda":
        pytest.skip("the CUDA C++ kernels share a row among blocks by the number of rows")
    V, H, rows = (50257, 1024, 600) if device == "cuda" else (211, 16, 300)
    layout = packed_layout(rows, V, step=1).to(device)
    generator = torch.Generator(device).manual_seed(4)
    weight = (torch.randn(V, H, generator=generator, device=device) * H**-0.5).to(dtype)
    row = torch.randn(H, generator=generator, device=device).to(dtype)
    label = layout.labels[5]

    def logps(places, **more):
        hidden = torch.randn(rows + 1, H, generator=generator, device=device).to(dtype)
        hidden[places] = row
        same = replace(layout, labels=label.expand(rows).contiguous())
        return linear_step_logps(hidden, weight, same, backend=name, batch_invariant=True, **more).tokens[places]

    want = logps([0])
    for places in range(7):
        assert (logps(list(range(places, rows, 7)), chunk_bytes=1 + (places % 2) * 10**9) == want).all()
    single = packed_layout(1, V).to(device)
    alone = linear_step_logps(
        row.expand(2, H), weight, replace(single, labels=label[None]), backend=name, batch_invariant=True
    )
    assert torch.equal(alone.tokens, want)


def test_a_gpu_is_asked_for_everything_the_cpu_is():
    """Every check above has cases for both devices, and one case passes 2^31 elements."""
    assert set(SIZES) == set(SMALL) == {"cuda", "cpu"}
    assert max(size.rows * size.vocab for size in SIZES["cuda"]) > 2**31
