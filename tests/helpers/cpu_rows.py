# SPDX-License-Identifier: Apache-2.0
"""Rows for the kernels of csrc/cpu, and their check against float64."""

import math

import torch

from helpers.truth import assert_fp64_rule, assert_rounded_once, gradient_terms
from sspo_ext.backends import cpu

NOT_BUILT = cpu.why_not(torch.device("cpu"), torch.float32)
ISAS = [] if NOT_BUILT else [name for name, reason in cpu._C.isas().items() if not reason]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MAPS = {"plain": (1.0, 0.0), "temperature": (1 / 0.7, 0.0), "softcap": (1 / 30.0, 30.0)}


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def random_logits(dtype, *shape, seed=0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 4).to(dtype)


def make(dtype, V, seed=0, spread=4.0):
    """logits (B, T, V), rows and labels of 5 of the 8 positions, with both ends of the vocabulary; row_of, coef."""
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(2, 4, V, generator=g) * spread).to(dtype)
    rows = torch.tensor([0, 2, 3, 5, 6])
    labels = torch.randint(0, V, (5,), generator=g)
    labels[0], labels[1] = 0, V - 1
    coef = torch.randn(5, generator=g).to(accumulator(dtype))
    return logits, rows, labels, row_of(rows, 8), coef


def row_of(rows, positions):
    table = torch.full((positions,), -1, dtype=torch.int32)
    table[rows] = torch.arange(len(rows), dtype=torch.int32)
    return table


def torch_logps_and_grad(logits, rows, labels, coef, a, c, dtype):
    """log_softmax + gather and its gradient by autograd, computed in `dtype`."""
    x = logits.to(dtype).detach().reshape(-1, logits.shape[-1]).requires_grad_()
    needed = x[rows]
    z = a * needed if c == 0 else c * torch.tanh(a * needed)
    logp = z.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    (grad,) = torch.autograd.grad(logp, x, coef.to(dtype))
    return logp.detach(), grad.view(logits.shape)


def assert_each_element(out, truth, logits, rows, labels, coef, a, c, name):
    got, truth, needed = (t.reshape(-1, t.shape[-1])[rows] for t in (out, truth, logits))
    terms = gradient_terms(needed, labels, coef, a, c)
    assert_rounded_once(got, truth, terms, f"{name} gradient")


def check_against_truth(logits, rows, labels, table, coef, a, c, name):
    V = logits.shape[-1]
    truth_logp, truth_grad = torch_logps_and_grad(logits, rows, labels, coef, a, c, torch.float64)
    torch_logp, torch_grad = torch_logps_and_grad(logits, rows, labels, coef, a, c, logits.dtype)
    logp, lse = cpu.token_logp_fwd(logits, rows, labels, a, c)
    assert logp.dtype == accumulator(logits.dtype) and lse.dtype == torch.float64
    assert not (logp > 0).any()
    # a log-prob is a difference of mapped logits, an element of the gradient one of numbers of the size of dL/dz
    finite = logits.double()[logits.isfinite() & (logits > torch.finfo(logits.dtype).min)]
    scale = max(1.0, (a if c == 0 else 1.0) * finite.abs().max().item())
    assert_fp64_rule(logp, torch_logp, truth_logp, V, f"{name} logp", scale=scale)
    out = torch.full(logits.shape, math.nan, dtype=logits.dtype)
    cpu.token_logp_bwd(logits, table, labels, lse, coef, None, a, c, out)
    grad_scale, length = None, 1
    if V <= 3 or logits.dtype == torch.float64:  # truth is 0, or torch's own
        grad_scale = (coef.abs().max() * (a if c == 0 else a * c)).item() * scale
    if logits.dtype == torch.float64:
        length = V
    assert_fp64_rule(out, torch_grad, truth_grad, length, f"{name} gradient", scale=grad_scale)
    assert_each_element(out, truth_grad, logits, rows, labels, coef, a, c, name)
    return logp, lse, out
