# SPDX-License-Identifier: Apache-2.0
"""Batches for the linear route, its truth in float64, and profilers that see inside the package's ops.

The truth is the reference backend on float64 logits, which tests/backends/test_reference.py holds to an oracle. The
yardstick is the same reference in the dtype the GEMMs run in, differentiated by autograd. An error may be twice the
yardstick's, in the largest element and in the root mean square (which sees a common factor that the largest element
hides).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sspo_ext.layout.pairs import StepPairs
from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.pref import step_pref_loss

GRADIENTS = {
    "hidden": (1, 0, 0),
    "weight": (0, 1, 0),
    "bias": (0, 0, 1),
    "hidden+weight": (1, 1, 0),
    "all": (1, 1, 1),
    "hidden+bias": (1, 0, 1),
}


def layout_of_lengths(lengths: list[int], V: int = 11, seed: int = 0) -> StepLayout:
    """One sequence whose step k has lengths[k] rows: row n is position n."""
    g = torch.Generator().manual_seed(seed)
    total = 1 + sum(lengths)
    ends = 1 + torch.tensor(lengths, dtype=torch.int64).cumsum(0)
    spans = torch.stack([ends - torch.tensor(lengths, dtype=torch.int64), ends], 1)
    labels = torch.randint(0, V, (total,), generator=g)
    return StepLayout.from_offsets(labels, torch.tensor([0, total]), spans)


def pairs_of(layout: StepLayout, *pairs: tuple[int, int], **values) -> StepPairs:
    return StepPairs.from_index(layout, torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2), **values)


@dataclass
class Problem:
    """hidden, weight and bias as they go into the linear route; their dtypes may differ."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.hidden.dtype, self.weight.dtype)

    def leaves(self, needs: tuple[int, int, int] = (1, 1, 1), dtype: torch.dtype | None = None) -> list[Tensor | None]:
        """Fresh leaves, in another dtype if given, with gradients where asked."""
        given = (self.hidden, self.weight, self.bias)
        return [
            None if t is None else t.detach().to(dtype or t.dtype).clone().requires_grad_(bool(n))
            for t, n in zip(given, needs, strict=True)
        ]


def problem(shape, V=37, H=13, *, seed=0, bias=True, hidden_dtype=torch.float32, weight_dtype=torch.float32, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, H, generator=g, dtype=torch.float64)
    weight = torch.randn(V, H, generator=g, dtype=torch.float64) * (scale * H**-0.5)
    b = torch.randn(V, generator=g, dtype=torch.float64) * 0.3 if bias else None
    return Problem(hidden.to(hidden_dtype), weight.to(weight_dtype), None if b is None else b.to(weight_dtype))


def collect(loss: Tensor, leaves: list[Tensor | None], upstream: float = 1.0) -> list[Tensor | None]:
    """[loss, gradient of each leaf that wants one]; backward as a trainer does it."""
    if loss.requires_grad:
        (loss * upstream).backward()
    return [loss.detach(), *(None if t is None else t.grad for t in leaves)]


def logits_route(p: Problem, layout, pairs, *, dtype, needs=(1, 1, 1), upstream=1.0, **options):
    """Loss and gradients by plain torch in `dtype`, on whole logits."""
    hidden, weight, bias = p.leaves(needs)

    def to(t):
        return None if t is None else t.to(dtype)

    logits = torch.nn.functional.linear(to(hidden), to(weight), to(bias))
    loss = step_pref_loss(logits, layout, pairs, backend="reference", **options).loss
    return collect(loss, [hidden, weight, bias], upstream)


def truth_of(p: Problem, layout, pairs, *, needs=(1, 1, 1), upstream=1.0, **options):
    """The same in float64, from the same rounded inputs."""
    exact = Problem(*(None if t is None else t.double() for t in (p.hidden, p.weight, p.bias)))
    return logits_route(exact, layout, pairs, dtype=torch.float64, needs=needs, upstream=upstream, **options)


def errors(got: Tensor, truth: Tensor) -> tuple[float, float]:
    """Largest and root mean square error."""
    e = (got.double() - truth).abs()
    return (e.max().item(), e.square().mean().sqrt().item()) if e.numel() else (0.0, 0.0)


def assert_linear_rule(name: str, got: Tensor, torch_: Tensor, truth: Tensor, gemm_dtype: torch.dtype) -> None:
    """err(got) <= 2 err(torch in the same dtype) + floor, where the floor is the result's own rounding and a few
    float32 operations: no floor for the length of a reduction, since torch's GEMMs make the same ones, and a bound on
    the root mean square beside helpers.truth.assert_fp64_rule's on the largest error."""
    assert got.shape == truth.shape and torch.isfinite(got).all(), f"{name}: {got}"
    accumulator = torch.finfo(torch.float64 if gemm_dtype == torch.float64 else torch.float32).eps
    unit = torch.finfo(got.dtype).eps / 2 + 8 * accumulator
    ours, theirs = errors(got, truth), errors(torch_, truth)
    size = (truth.abs().max().item(), truth.square().mean().sqrt().item()) if truth.numel() else (0.0, 0.0)
    for norm, e, t, s in zip(("max", "rms"), ours, theirs, size, strict=True):
        floor = unit * (s if norm == "max" else 0.6 * s) + 1e-30
        assert e <= 2 * t + floor, f"{name}, {norm}: error {e:.3g}, torch's {t:.3g}, floor {floor:.3g}, size {s:.3g}"


# ---- profilers: unlike a TorchDispatchMode they see what runs inside an op and inside ATen

_GEMMS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::baddbmm_"}


def gemm_flops(fn: Callable[[], object]) -> int:
    """FLOPs of the matrix products that ran, from the shapes the profiler recorded. A vector times a matrix does
    not count."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as p:
        fn()
    total = 0
    for event in p.events():
        if event.name in _GEMMS:
            first = 1 if "add" in event.name else 0  # addmm(bias, a, b)
            a, b = event.input_shapes[first : first + 2]
            assert a[-1] == b[-2], (event.name, event.input_shapes)
            batch = a[0] if len(a) == 3 else 1
            total += 2 * batch * a[-2] * a[-1] * b[-1]
    return total


def peak_bytes(fn: Callable[[], object]) -> int:
    """Peak of the allocator's bytes above what was allocated before, temporaries inside ATen included."""
    return memory(fn)[0]


def memory(fn: Callable[[], object]) -> tuple[int, int]:
    """(peak, what is left) of the allocator's bytes above what was allocated before."""
    gc.collect()  # garbage of other tests must not be freed, and counted, in between
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
            fn()
    finally:
        gc.enable()
    live = peak = 0
    for event in p.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak, live
