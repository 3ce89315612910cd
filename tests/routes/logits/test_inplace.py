# SPDX-License-Identifier: Apache-2.0
"""inplace_backward: what the gradient handed out is, and what is refused. Values are in test_pref.py.

Mutations, each caught by the test named:
  the saved logits returned as the gradient                test_the_gradient_is_no_part_of_the_models_graph
  a kept linear gradient that requires grad                test_linear_gradients_are_no_part_of_the_models_graph
  no second look after the reductions chose the reference  test_reductions_that_only_the_reference_has_are_refused
  strides compared with 0 alone                            test_logits_that_overlap_themselves_are_refused
  an extent taken as a size, not as size - 1               test_views_that_do_not_overlap_are_taken
  no look at whether there is an element                   test_no_logits_overlap_nothing
"""

import pytest
import torch
from helpers.batch import random_batch

from sspo_ext import backends
from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.logps import linear_step_logps, step_logps
from sspo_ext.losses.policy import linear_step_policy_loss, step_policy_loss
from sspo_ext.losses.pref import linear_step_pref_loss, step_pref_loss

B, T, V, H = 4, 12, 11, 6
LAYOUT = random_batch(1).layout
STEPS = torch.linspace(-1, 1, LAYOUT.num_steps)

LOGITS = {
    "pref": lambda x, **kw: step_pref_loss(x, LAYOUT, **kw).loss,
    "logps": lambda x, **kw: step_logps(x, LAYOUT, **kw).sums.sum(),
    "reductions": lambda x, **kw: step_logps(x, LAYOUT, entropy=True, sum_p2=True, **kw).entropy.sum(),
    "policy": lambda x, **kw: step_policy_loss(x, LAYOUT, STEPS, entropy_coef=0.1, **kw).loss,
}
LINEAR = {
    "linear pref": lambda x, w: linear_step_pref_loss(x, w, LAYOUT).loss,
    "linear logps": lambda x, w: linear_step_logps(x, w, LAYOUT).sums.sum(),
    "linear reductions": lambda x, w: linear_step_logps(x, w, LAYOUT, entropy=True).entropy.sum(),
    "linear policy": lambda x, w: linear_step_policy_loss(x, w, LAYOUT, STEPS).loss,
}


def is_plain(gradient):
    return not gradient.requires_grad and gradient.grad_fn is None


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", LOGITS)
def test_the_gradient_is_no_part_of_the_models_graph(name, inplace):
    """Else whoever keeps it keeps every activation, and may differentiate it as the model's output."""
    logits = random_batch(1).logits.requires_grad_() * 1
    seen = []
    logits.register_hook(lambda g: seen.append(is_plain(g)))
    (gradient,) = torch.autograd.grad(LOGITS[name](logits, inplace_backward=inplace), logits)
    assert is_plain(gradient) and seen == [True]
    assert (gradient.data_ptr() == logits.data_ptr()) == inplace


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", LINEAR)
def test_linear_gradients_are_no_part_of_the_models_graph(name, frozen, keep):
    leaves = [torch.randn(B, T, H).requires_grad_(), torch.randn(V, H).requires_grad_(not frozen)]
    x, w = (leaf * 1 for leaf in leaves)
    wanted = [x] if frozen else [x, w]
    assert all(is_plain(g) for g in torch.autograd.grad(LINEAR[name](x, w), wanted, retain_graph=keep))


def test_reductions_that_only_the_reference_has_are_refused(monkeypatch):
    """As on a GPU without Triton, whose C++ kernels have no reductions."""
    monkeypatch.delattr(backends.load("cpu"), "row_reductions_fwd")
    for name in ("reductions", "policy"):
        with pytest.raises(ValueError, match="inplace_backward: the reference backend cannot write over the logits"):
            LOGITS[name](random_batch(1).logits.requires_grad_() * 1, inplace_backward=True)
    assert LOGITS["logps"](random_batch(1).logits.requires_grad_() * 1, inplace_backward=True).requires_grad


@pytest.mark.parametrize("strides", [(T * V, 0, 1), (0, V, 1), (T * V, V - 1, 1), (V, V, 1), ((T - 1) * V, V, 1)])
def test_logits_that_overlap_themselves_are_refused(strides):
    logits = (torch.randn(B * T * V).requires_grad_() * 1).as_strided((B, T, V), strides)
    for call in LOGITS.values():
        with pytest.raises(ValueError, match="inplace_backward: expected logits whose elements do not share memory"):
            call(logits, inplace_backward=True)


@pytest.mark.parametrize(
    "strides", [(T * V, V, 1), (V, B * V, 1), (T * (V + 3), V + 3, 1), ((T - 1) * 2 * V + V, 2 * V, 1)]
)
def test_views_that_do_not_overlap_are_taken(strides):
    source = torch.randn(2 * B * T * (V + 3))
    logits = (source.clone().requires_grad_() * 1).as_strided((B, T, V), strides)
    plain = source.as_strided((B, T, V), strides).clone().requires_grad_()
    (got,) = torch.autograd.grad(LOGITS["pref"](logits, inplace_backward=True), logits)
    assert torch.equal(got, torch.autograd.grad(LOGITS["pref"](plain), plain)[0])


@pytest.mark.parametrize("batch, length", [(0, T), (B, 0)])
def test_no_logits_overlap_nothing(batch, length):
    nothing = torch.full((batch, length), -1)
    layout = StepLayout.from_step_ids(nothing, nothing)
    logits = torch.randn(1, T, V, requires_grad=True).expand(B, T, V)[:batch, :length]
    (gradient,) = torch.autograd.grad(step_pref_loss(logits, layout, inplace_backward=True).loss, logits)
    assert gradient.shape == logits.shape
