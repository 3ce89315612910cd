# SPDX-License-Identifier: Apache-2.0
"""The ends of what scale, softcap and temperature may be, and logits whose product with them leaves float32: one
contract in every backend, the softmax of their differences. Beyond the ends: test_logit_map in test_reference.py.
"""

import pytest
import torch

from sspo_ext import backends
from sspo_ext.backends import reference
from sspo_ext.routes.shared import logit_map

# temperature, softcap, scale, size of the logits
ENDS = {
    "widest softcap": (1.0, 1e30, 1.0, 1.0),
    "narrowest softcap": (1.0, 1e-30, 1e-30, 1.0),
    "lowest temperature": (1e-30, None, 1.0, 1e-30),
    "highest temperature": (1e30, None, 1.0, 1e30),
    "product beyond float32": (1.0, None, 10.0, 1e38),
    "products of both signs beyond float32": (1e-3, None, 1.0, 3e38),
}
V, ROWS, LABELS = 300, torch.tensor([0, 2]), torch.tensor([5, 299])


def make_logits(size: float) -> torch.Tensor:
    """Differences of about 1 / scale between the largest logits, the label of row 1 one of them."""
    x = (torch.rand((1, 3, V), generator=torch.Generator().manual_seed(0)) * 2 - 1) * size
    x[..., 5::50] = size
    return x


def truth(x: torch.Tensor, a: float, c: float) -> tuple[list[torch.Tensor], torch.Tensor]:
    """[logp, entropy, sum_p2] and the gradient of the log-probs' sum, in float64."""
    x = x.double().requires_grad_()
    logp = reference.token_logps(x, ROWS, LABELS, a, c)
    entropy, sum_p2, _ = reference.row_reductions(x, ROWS, None, a, c)
    (grad,) = torch.autograd.grad(logp.sum(), x)
    return [logp.detach().float().double(), entropy.detach(), sum_p2.detach()], grad


@pytest.mark.parametrize("end", ENDS)
def test_reference(end):
    temperature, cap, scale, size = ENDS[end]
    a, c = logit_map(temperature, cap, scale)
    x = make_logits(size)
    (logp, entropy, sum_p2), exact = truth(x, a, c)
    x.requires_grad_()
    got = reference.token_logps(x, ROWS, LABELS, a, c)
    (grad,) = torch.autograd.grad(got.sum(), x)
    torch.testing.assert_close(got.detach().double(), logp, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=1e-6 * exact.abs().max().item())
    for value, want in zip(reference.row_reductions(x, ROWS, None, a, c), (entropy, sum_p2), strict=False):
        torch.testing.assert_close(value.detach().double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.interpreted
@pytest.mark.parametrize("end", ENDS)
def test_kernels(backend, end):
    temperature, cap, scale, size = ENDS[end]
    a, c = logit_map(temperature, cap, scale)
    x, kernels = make_logits(size), backends.load(backend)
    (want, *_), exact = truth(x, a, c)
    logp, lse = kernels.token_logp_fwd(x, ROWS, LABELS, a, c)
    torch.testing.assert_close(logp.double(), want, rtol=1e-6, atol=2e-6)
    out, row_of = torch.empty_like(x), torch.tensor([0, -1, 1], dtype=torch.int32)
    kernels.token_logp_bwd(x, row_of, LABELS, lse, torch.ones(2), None, a, c, out)
    assert out.isfinite().all()
    if backend == "cpu" or size < 1e13:  # docs/numerics.md, "Huge finite logits"
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-6 * exact.abs().max().item())
