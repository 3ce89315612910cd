# SPDX-License-Identifier: Apache-2.0
"""step_pref_loss with its gradient, and a comparison, for its tests."""

# ruff: noqa: E501 (tables of calls and their messages)
import torch

from sspo_ext.losses.pref import step_pref_loss

F64 = torch.float64
LOSSES = ["sigmoid", "hinge", "ipo", "simpo"]


def loss_and_grad(logits, *args, upstream=1.0, **kw):
    logits = logits.detach().clone().requires_grad_()
    out = step_pref_loss(logits * 1, *args, **kw)
    (out.loss * upstream).backward()
    return out, logits.grad


def assert_near(got, want, rel, what):
    error = (got.double() - want.double()).abs().max().item() if want.numel() else 0.0
    bound = rel * (want.double().abs().max().item() if want.numel() else 0.0) + 1e-3 * rel
    assert got.shape == want.shape and error <= bound, f"{what}: error {error:.3g}, allowed {bound:.3g}"
