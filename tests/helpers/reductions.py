# SPDX-License-Identifier: Apache-2.0
"""Rows for the kernels with further reductions, their truth in float64 and the check that every backend must pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from helpers.truth import assert_fp64_rule, assert_rounded_once
from sspo_ext.backends import reference
from sspo_ext.routes.shared import gradient_coefs

MAPS = {
    "plain": (1.0, 0.0),
    "temperature": (1 / 0.7, 0.0),
    "softcap": (1 / 30.0, 30.0 / 0.9),
    "small cap": (1 / 3, 3.0),
}
# of log-prob, entropy, sum of squares and KL; each alone too, since one could hide another
UPSTREAMS = {
    "all": (1.3, -0.7, 2.1, 0.9),
    "log-prob": (1.0, 0.0, 0.0, 0.0),
    "entropy": (0.0, 1.0, 0.0, 0.0),
    "sum_p2": (0.0, 0.0, 1.0, 0.0),
    "kl": (0.0, 0.0, 0.0, 1.0),
    "entropy and kl": (0.0, 1.0, 0.0, 1.0),
}


class ReductionRows:
    """(2, 4, V) logits anywhere in memory, 5 of the 8 rows scored, the last of them without a gradient; `few`, for slow
    kernels: (2, 2, V), 3 of the 4 rows scored. Tiny vocabularies have 16 times the rows: of ten logits, torch's largest
    error, by which the rule measures, is a matter of luck.
    """

    def __init__(
        self, V: int, dtype: torch.dtype, a: float, c: float, *, seed=0, spread=4.0, offset=0, ref=True, few=False
    ):
        g = torch.Generator().manual_seed(seed)
        self.V, self.a, self.c = V, a, c
        times = 16 if V <= 3 and not few else 1
        shape = (2, 2 if few else 4 * times, V)
        noise = torch.randn(shape, generator=g) * spread
        storage = torch.full((offset + noise.numel() + 16,), math.nan, dtype=dtype)
        self.logits = storage[offset : offset + noise.numel()].view(shape).copy_(noise)
        # near the logits, as a policy is near its reference; laid out another way
        near = noise + torch.randn(shape, generator=g)
        self.ref = near.to(dtype).transpose(0, 1).contiguous().transpose(0, 1) if ref else None
        self.rows = torch.tensor([0, 1, 3] if few else [8 * i + k for i in range(times) for k in (0, 2, 3, 5, 6)])
        self.labels = torch.randint(0, V, self.rows.shape, generator=g)
        self.labels[0], self.labels[1] = 0, V - 1
        self.row_of = torch.full((shape[0] * shape[1],), -1, dtype=torch.int32)
        self.row_of[self.rows] = torch.arange(len(self.rows), dtype=torch.int32)
        self.varied = torch.tensor([1.0, -0.5, 2.0, 0.3, 0.0] * times)[: len(self.rows)]

    def truth(self, dtype: torch.dtype, upstream) -> tuple[list[Tensor], Tensor]:
        """[logp, entropy, sum_p2, kl] and the gradient of the logits, by the specification in `dtype`."""
        x = self.logits.detach().to(dtype).requires_grad_()
        ref = None if self.ref is None else self.ref.to(dtype)
        logp = reference.token_logps(x, self.rows, self.labels, self.a, self.c)
        values = [logp, *reference.row_reductions(x, self.rows, ref, self.a, self.c)]
        if ref is None:
            values.pop()
        total = sum(u * (self.varied.to(v.dtype) * v).sum() for u, v in zip(upstream, values, strict=False) if u)
        (grad,) = torch.autograd.grad(total, x)
        return [v.detach() for v in values], grad

    def gradient_terms(self, upstream) -> Tensor:
        """helpers.truth.gradient_terms for the weighted sum of all four, whose derivatives by a logit are onehot - p,
        -p (log p + H), 2 p (p - sum_p2) and p - q."""
        rows = self.logits.double().reshape(-1, self.V)[self.rows]
        ref = rows if self.ref is None else self.ref.double().reshape(-1, self.V)[self.rows]
        z, z_ref = (reference.map_logits(x, self.a, self.c) for x in (rows, ref))
        logs, logs_ref = z.log_softmax(-1), z_ref.log_softmax(-1)
        p, q = logs.exp(), logs_ref.exp()
        d_logp, d_entropy, d_squares, d_kl = (abs(u) for u in upstream)
        # 0 times infinity: a masked token
        entropy = (p * logs.abs()).nan_to_num().sum(-1, keepdim=True)
        factor = d_logp + d_kl + d_entropy * (logs.abs() + entropy) + 2 * d_squares * (p + p.square().sum(-1, True))
        terms = (p * (factor * (1 + z.abs() + logs.abs()) + d_entropy)).nan_to_num()
        terms = terms + (d_kl * q * (1 + z_ref.abs() + logs_ref.abs())).nan_to_num()
        terms[torch.arange(len(self.rows)), self.labels] += d_logp
        return terms * (self.varied.double().abs() * self.a * (self.c or 1.0))[:, None]

    def run(
        self, kernels, upstream, out: Tensor | None = None, wanted: tuple[bool, bool] = (True, True)
    ) -> tuple[list[Tensor], Tensor]:
        """[logp, entropy, sum_p2, kl] and the gradient of the logits. `wanted`: entropy, sum_p2."""
        logp, lse, entropy, sum_p2, kl, ref_lse = kernels.row_reductions_fwd(
            self.logits, self.rows, self.labels, self.ref, self.a, self.c, *wanted
        )
        assert lse.dtype == ref_lse.dtype == torch.float64
        d = [u * self.varied.to(entropy.dtype) if u else None for u in upstream]
        coefs = gradient_coefs(entropy, sum_p2, *d)
        storage = torch.full((self.logits.numel() + 32,), math.nan, dtype=self.logits.dtype)
        into = storage[16:-16].view(self.logits.shape) if out is None else out
        ref = self.ref if upstream[3] else None
        kernels.row_reductions_bwd(
            self.logits, self.row_of, self.labels, lse, ref, ref_lse, coefs, self.a, self.c, into
        )
        assert storage[:16].isnan().all() and storage[-16:].isnan().all(), "wrote outside the gradient"
        return [logp, entropy, sum_p2] + ([] if self.ref is None else [kl]), into


# A softcap, and a x from .. to: where tanh bends, where it is close to 1, and where float32 cannot tell it from 1.
SATURATED = [(50.0, 0.2, 1.5), (50.0, 1.0, 3.0), (30.0, 2.0, 5.0), (30.0, 4.0, 7.0), (50.0, 6.0, 9.0), (3.0, 8.0, 14.0)]


def saturated(V: int, dtype: torch.dtype, cap: float, low: float, high: float, few: bool = False) -> ReductionRows:
    """Rows whose logits, and the reference's, are spread evenly over [low, high] times the softcap."""
    case = ReductionRows(V, dtype, 1 / cap, cap / 0.9, few=few)
    g = torch.Generator().manual_seed(5)
    for logits in (case.logits, case.ref):
        logits.copy_(cap * (low + (high - low) * torch.rand(logits.shape, generator=g)))
    return case


def check_wide_cap(kernels, dtype: torch.dtype, few: bool = False) -> None:
    """A softcap of a million is none, so it must not cost the logits their digits."""
    case, plain = (ReductionRows(67, dtype, a, c, few=few) for a, c in ((1e-6, 1e6), (1.0, 0.0)))
    values, grad = case.run(kernels, UPSTREAMS["all"])
    expected, expected_grad = plain.run(kernels, UPSTREAMS["all"])
    for got, want in zip([*values, grad], [*expected, expected_grad], strict=True):
        torch.testing.assert_close(got, want, rtol=torch.finfo(got.dtype).eps * 4, atol=2e-5)


def check(kernels, case: ReductionRows, name: str, upstream=UPSTREAMS["all"]) -> None:
    """The accuracy rule for the values and the gradient; zeros where nothing has a gradient."""
    if case.ref is None:
        upstream = (*upstream[:3], 0.0)
    truth, truth_grad = case.truth(torch.float64, upstream)
    torch_values, torch_grad = case.truth(case.logits.dtype, upstream)
    values, grad = case.run(kernels, upstream)
    wanted = (upstream[1] != 0, upstream[2] != 0)
    needed, same_grad = case.run(kernels, upstream, wanted=wanted)
    assert torch.equal(same_grad, grad), "the gradient depends on what else is asked for"
    for asked, lone, value in zip((True, *wanted, True), needed, values, strict=False):
        assert torch.equal(lone, value if asked else value[:0]), "a value depends on what else is asked for"
    # sums of terms of the size of an exponent and of log V
    size = max(1.0, (case.a if case.c == 0 else 1.0) * case.logits.double().abs().max().item())
    of_p = size if values[0].dtype == torch.float64 else None  # torch's own error is unknown there: below
    scales = {"logp": size, "entropy": math.log(case.V) + 1, "sum_p2": of_p, "kl": 2 * (math.log(case.V) + 1)}
    for (what, scale), got, other, exact in zip(scales.items(), values, torch_values, truth, strict=False):
        assert got.dtype == other.dtype
        assert_fp64_rule(got, other, exact, case.V, f"{name} {what}", scale=scale)
    assert (values[1] >= 0).all() and ((values[2] > 0) & (values[2] <= 1 + 1e-6)).all()
    assert case.ref is None or (values[3] >= 0).all()
    # an element is a difference of terms of the size of what arrives, a square's derivative having a factor of 2
    terms = case.varied.abs().max().item() * sum(abs(u) * f for u, f in zip(upstream, (1, 1, 2, 1), strict=True))
    scale = case.a * (case.c or 1.0) * terms
    # beside its rounding to the dtype, which is torch's too, the gradient is that of a float32 row
    exact_eps = torch.finfo(values[0].dtype).eps / torch.finfo(grad.dtype).eps
    length = 1
    if grad.dtype == torch.float64:  # truth is the same arithmetic as torch's
        length, scale = case.V, scale * size
    assert_fp64_rule(grad, torch_grad, truth_grad, length, f"{name} gradient", scale=scale * exact_eps)
    got, exact = (t.reshape(-1, case.V)[case.rows] for t in (grad, truth_grad))
    assert_rounded_once(got, exact, case.gradient_terms(upstream), f"{name} gradient")
    flat, scored = grad.view(-1, case.V), case.rows[case.varied != 0]
    others = [i for i in range(len(flat)) if i not in scored.tolist()]
    assert (flat[others] == 0).all(), "a gradient where nothing is scored"


def check_masks(backend, V: int, dtype: torch.dtype, mask: float, masked: slice, few: bool = False) -> None:
    """KL and its gradient where the policy masks with -inf and the reference with `mask`, which allows nothing."""
    case = ReductionRows(V, dtype, 1.0, 0.0, few=few)
    case.logits[..., masked], case.ref[..., masked] = -math.inf, mask
    allowed = torch.ones(V, dtype=torch.bool)
    allowed[masked] = False
    allowed = torch.arange(V)[allowed]
    case.labels = allowed[case.labels % len(allowed)]
    (_, _, _, kl), grad = case.run(backend, UPSTREAMS["kl"])
    case.ref[..., masked] = -math.inf
    (_, _, _, want), want_grad = case.truth(torch.float64, UPSTREAMS["kl"])
    torch.testing.assert_close(kl.double(), want, rtol=1e-5, atol=1e-6, msg=f"{mask} {masked}: {kl}, {want}")
    rtol = torch.finfo(dtype).eps + 4e-6
    torch.testing.assert_close(grad.double(), want_grad, rtol=rtol, atol=1e-7 * want_grad.abs().max().item())
