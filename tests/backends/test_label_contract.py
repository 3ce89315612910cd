# SPDX-License-Identifier: Apache-2.0
"""One contract for labels, in every backend that can run here, forward and backward, plain rows and reductions.

A label in [0, V) is a column. A label of -1 is in another shard of the vocabulary: its log-prob is -lse, which
`VocabShard.combine` needs, and its gradient has no one-hot term. Any other label is an error that must show: its
log-prob and its whole row of the gradient are NaN. What does not depend on the label, and every other row, stays as it
is; a row without a gradient is zeros whatever its label. The CUDA C++ kernels are held to the same in
test_cuda_emulation.py (test_labels_and_rows_out_of_range); the reference is plain torch, which raises.

Mutations tried in the Triton kernels and the tests that failed:
  a wrong label not NaN, backward of reductions      test_gradient_of_reductions
  a wrong label not NaN, backward of log-probs       test_gradient_of_log_probs
  -1 counted as wrong, backward                      test_gradient_of_log_probs, test_gradient_of_reductions
  -1 not -lse, forward                               test_log_probs, test_reductions
  a wrong label read as a logit of 0, forward        test_log_probs, test_reductions
"""

import math

import pytest
import torch
from helpers.reductions import UPSTREAMS

from sspo_ext import backends
from sspo_ext.backends import reference
from sspo_ext.routes.shared import gradient_coefs

MAPS = [(1.0, 0.0), (1 / 30.0, 30.0 / 0.9)]
NO_LABEL = -1
VOCABULARIES = [5, 1037]


class Rows:
    """(2, 5, V) logits. Rows at positions 1 to 9: four with labels in the vocabulary, one without, four wrong ones."""

    def __init__(self, V: int, a: float, c: float):
        g = torch.Generator().manual_seed(V)
        self.V, self.a, self.c = V, a, c
        self.logits = torch.randn((2, 5, V), generator=g) * 3
        self.ref = self.logits + torch.randn((2, 5, V), generator=g)
        self.rows = torch.arange(1, 10)
        self.labels = torch.tensor([0, V, V - 1, NO_LABEL, -2, 3, 2**40, V // 2, -(2**40)])
        self.known = (self.labels >= 0) & (self.labels < V)
        self.wrong = ~self.known & (self.labels != NO_LABEL)
        self.row_of = torch.arange(-1, 9, dtype=torch.int32)

    def truth(
        self, upstream: tuple[float, float, float, float]
    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """[logp, entropy, sum_p2, kl], lse and the rows' gradient in float64. The log-prob of a label outside the
        vocabulary is -lse here, wrong labels included."""
        x = self.logits.double().requires_grad_()
        z = reference.map_logits(x.reshape(-1, self.V)[self.rows], self.a, self.c)
        lse = z.logsumexp(-1)
        logit = z.gather(-1, self.labels.where(self.known, 0)[:, None])[:, 0]
        logp = torch.where(self.known, logit, 0.0) - lse
        values = [logp, *reference.row_reductions(x, self.rows, self.ref.double(), self.a, self.c)]
        (grad,) = torch.autograd.grad(sum(u * v.sum() for u, v in zip(upstream, values, strict=True)), x)
        return [v.detach() for v in values], lse.detach(), grad.view(-1, self.V)[self.rows]

    def check_log_probs(self, logp: torch.Tensor, lse: torch.Tensor) -> None:
        (exact, *_), exact_lse, _ = self.truth(UPSTREAMS["all"])
        torch.testing.assert_close(lse, exact_lse, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(logp[~self.wrong].double(), exact[~self.wrong], rtol=1e-6, atol=1e-5)
        assert torch.equal(logp[self.labels == NO_LABEL], -lse[self.labels == NO_LABEL].float())
        assert logp[self.wrong].isnan().all()

    def check_gradient(self, grad: torch.Tensor, exact: torch.Tensor) -> None:
        grad = grad.view(-1, self.V)
        assert (grad[0] == 0).all(), "a gradient where nothing is scored"
        got = grad[self.rows]
        assert got[self.wrong].isnan().all(), "a wrong label does not show in the whole row"
        torch.testing.assert_close(got[~self.wrong].double(), exact[~self.wrong], rtol=1e-4, atol=1e-6)


@pytest.fixture(params=MAPS, ids=["plain", "softcap"])
def mapping(request):
    return request.param


def with_reductions(backend: str):
    kernels = backends.load(backend)
    if not hasattr(kernels, "row_reductions_fwd"):
        pytest.skip(f"{backend} has no reductions")
    return kernels


@pytest.mark.interpreted
@pytest.mark.parametrize("V", VOCABULARIES)
def test_log_probs(backend, mapping, V):
    case = Rows(V, *mapping)
    case.check_log_probs(*backends.load(backend).token_logp_fwd(case.logits, case.rows, case.labels, case.a, case.c))


@pytest.mark.interpreted
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "in place"])
@pytest.mark.parametrize("V", VOCABULARIES)
def test_gradient_of_log_probs(backend, mapping, V, inplace):
    case = Rows(V, *mapping)
    *_, lse, exact = case.truth((1.0, 0.0, 0.0, 0.0))
    coef = torch.tensor([0.7, -1.3, 2.0, 0.4, 1.1, -0.2, 0.9, 1.0, 0.3])
    out = case.logits.clone() if inplace else torch.full_like(case.logits, math.pi)
    logits = out if inplace else case.logits
    kernels, upstream = backends.load(backend), torch.tensor(1.5)
    kernels.token_logp_bwd(logits, case.row_of, case.labels, lse, coef, upstream, case.a, case.c, out)
    case.check_gradient(out, exact * (coef * upstream).double()[:, None])


@pytest.mark.interpreted
@pytest.mark.parametrize("V", VOCABULARIES)
def test_reductions(backend, mapping, V):
    case = Rows(V, *mapping)
    logp, lse, *values, ref_lse = with_reductions(backend).row_reductions_fwd(
        case.logits, case.rows, case.labels, case.ref, case.a, case.c
    )
    case.check_log_probs(logp, lse)
    (_, *exact), _, _ = case.truth(UPSTREAMS["all"])
    for value, truth in zip(values, exact, strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=2e-5)
    assert ref_lse.isfinite().all()


@pytest.mark.interpreted
@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_gradient_of_reductions(backend, mapping, V, upstream):
    """A wrong label shows even where nothing arrives at the log-prob."""
    case, upstream = Rows(V, *mapping), UPSTREAMS[upstream]
    (_, entropy, sum_p2, _), lse, exact = case.truth(upstream)
    ref_lse = reference.map_logits(case.ref.double().view(-1, V)[case.rows], case.a, case.c).logsumexp(-1)
    d = [torch.full((9,), u) if u else None for u in upstream]
    coefs = gradient_coefs(entropy.float(), sum_p2.float(), *d)
    ref, out = case.ref if upstream[3] else None, torch.full_like(case.logits, math.pi)
    with_reductions(backend).row_reductions_bwd(
        case.logits, case.row_of, case.labels, lse, ref, ref_lse, coefs, case.a, case.c, out
    )
    case.check_gradient(out, exact)


@pytest.mark.interpreted
def test_rows_without_a_gradient_are_zeros_whatever_their_label(backend):
    case = Rows(37, 1.0, 0.0)
    kernels = backends.load(backend)
    _, lse = kernels.token_logp_fwd(case.logits, case.rows, case.labels, 1.0, 0.0)
    out = torch.full_like(case.logits, math.pi)
    kernels.token_logp_bwd(case.logits, case.row_of, case.labels, lse, torch.zeros(9), None, 1.0, 0.0, out)
    assert (out == 0).all()
    if hasattr(kernels, "row_reductions_bwd"):
        out.fill_(math.pi)
        kernels.row_reductions_bwd(
            case.logits, case.row_of, case.labels, lse, None, lse, torch.zeros(9, 5), 1.0, 0.0, out
        )
        assert (out == 0).all()


@pytest.mark.parametrize("label", [NO_LABEL, -2, 5, 2**40])
def test_the_reference_raises(label):
    """It never meets a shard: linear.py refuses a process group beside backend="reference"."""
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        reference.token_logps(torch.randn(1, 2, 5), torch.tensor([0]), torch.tensor([label]), 1.0, 0.0)
