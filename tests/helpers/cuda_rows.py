# SPDX-License-Identifier: Apache-2.0
"""Rows for the CUDA kernels, and their check against float64."""

from __future__ import annotations

import torch

from helpers.truth import assert_fp64_rule, assert_rounded_once, gradient_terms
from sspo_ext.backends import cuda, reference


class Rows:
    """Logits anywhere in memory, some rows of them scored, and the truth about them in float64."""

    def __init__(self, V, dtype, a, c, *, B=2, T=2, offset=0, spread=4.0, positions=(3, 0, 1), coef=(0.7, -1.3, 0.0)):
        self.storage = torch.full((offset + B * T * V + 8,), float("nan"), dtype=dtype)
        self.logits = self.storage[offset : offset + B * T * V].view(B, T, V)
        self.logits.copy_(torch.randn(B, T, V) * spread)
        self.a, self.c, self.V = a, c, V
        self.rows = torch.tensor(positions, dtype=torch.int64)
        self.labels = torch.randint(V, (len(positions),))
        self.coef = torch.tensor(coef)
        self.upstream = torch.tensor(1.5)
        self.row_of = torch.full((B * T,), -1, dtype=torch.int32)
        self.row_of[self.rows] = torch.arange(len(positions), dtype=torch.int32)

    def forward(self):
        return cuda.token_logp_fwd(self.logits, self.rows, self.labels, self.a, self.c)

    def backward(self, lse, out=None, out_offset=0):
        """Gradient into the middle of a NaN-poisoned buffer, which must stay poisoned around it."""
        storage = None
        if out is None:
            storage = torch.full((8 + out_offset + self.logits.numel() + 8,), float("nan"), dtype=self.logits.dtype)
            out = storage[8 + out_offset : -8].view(self.logits.shape)
        cuda.token_logp_bwd(
            self.logits, self.row_of, self.labels, lse, self.coef, self.upstream, self.a, self.c, out
        )  # fmt: skip
        if storage is not None:
            around = torch.cat([storage[: 8 + out_offset], storage[-8:]])
            assert around.isnan().all(), "wrote outside the gradient"
        return out

    def truth(self, dtype=torch.float64):
        """(logp, lse, gradient) by torch in `dtype`."""
        x = self.logits.detach().to(dtype).requires_grad_()
        z = reference.map_logits(x.reshape(-1, self.V)[self.rows], self.a, self.c)
        logp = z.log_softmax(-1).gather(-1, self.labels[:, None])[:, 0]
        (grad,) = torch.autograd.grad(logp, x, self.coef.to(dtype) * self.upstream.to(dtype))
        return logp.detach(), z.detach().logsumexp(-1), grad


def check(case: Rows, **where):
    """Forward and backward by the one accuracy rule; returns what they gave."""
    truth, by_torch = case.truth(), case.truth(torch.float32)
    before = case.storage.clone()
    logp, lse = case.forward()
    assert torch.equal(case.storage.view(torch.uint8), before.view(torch.uint8)), "forward changed its input"
    assert logp.dtype == torch.float32 and lse.dtype == torch.float64
    assert_fp64_rule(logp, by_torch[0], truth[0], case.V, "logp")
    assert_fp64_rule(lse.float(), by_torch[1].float(), truth[1], case.V, "lse")
    grad = case.backward(lse, **where)
    # of a V of 1 truth is 0, and what is left is float32's
    scale = case.a * (case.c or 1.0) if case.V == 1 else None
    assert_fp64_rule(grad, by_torch[2].to(grad.dtype), truth[2], 1, "gradient", scale=scale)
    got, exact, needed = (t.reshape(-1, case.V)[case.rows] for t in (grad, truth[2], case.logits))
    terms = gradient_terms(needed, case.labels, case.coef * case.upstream, case.a, case.c)
    assert_rounded_once(got, exact, terms, "gradient")
    scored = torch.zeros(grad.shape[0] * grad.shape[1], dtype=torch.bool)
    scored[case.rows[case.coef != 0]] = True
    assert (grad.reshape(-1, case.V)[~scored] == 0).all(), "gradient where nothing is scored"
    return logp, lse, grad
