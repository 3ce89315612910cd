# SPDX-License-Identifier: Apache-2.0
"""step_pref_loss with inplace_backward; second derivatives.

Mutations, each caught by the test named (on a copy of the package):
  in place without the version             test_inplace_makes_a_later_reader_error
  second derivative not refused            test_a_second_derivative_raises
  in place writes a new buffer             test_inplace_gives_the_same_gradient_in_the_logits_memory
"""

# ruff: noqa: E501 (tables of calls and their messages)
import pytest
import torch
from helpers.batch import dtypes_of, pack, random_batch
from helpers.pref import loss_and_grad

from sspo_ext.losses.logps import step_logps
from sspo_ext.losses.pref import step_pref_loss


def test_inplace_gives_the_same_gradient_in_the_logits_memory(backend):
    for dtype in dtypes_of(backend):
        batch = random_batch(1, dtype=dtype)
        _, want = loss_and_grad(batch.logits, batch.layout, backend=backend)
        leaf = batch.logits.clone().requires_grad_()
        logits = leaf * 1
        seen = []
        logits.register_hook(lambda g, seen=seen: seen.append(g.data_ptr()))
        step_pref_loss(logits, batch.layout, backend=backend, inplace_backward=True).loss.backward()
        assert torch.equal(leaf.grad, want)
        assert seen == [logits.data_ptr()], "no second buffer"
        assert torch.equal(logits.detach(), want)


@pytest.mark.parametrize("view", ["time first", "padded vocabulary", "packed"])
def test_inplace_on_views(backend, view):
    batch = random_batch(1, V=19)
    x, layout = batch.logits, batch.layout
    if view == "packed":
        x, layout, _, _ = pack(batch)
    _, want = loss_and_grad(x, layout, backend=backend)
    leaf = x.clone().requires_grad_()
    if view == "time first":
        logits = (leaf.transpose(0, 1) * 1).transpose(0, 1)
    elif view == "padded vocabulary":
        logits = torch.nn.functional.pad(leaf, (0, 5))[..., :19]
    else:
        logits = leaf * 1
    step_pref_loss(logits, layout, backend=backend, inplace_backward=True).loss.backward()
    assert torch.equal(leaf.grad, want)


@pytest.mark.parametrize("later", ["another loss", "pow", "the same loss again"])
def test_inplace_makes_a_later_reader_error(backend, later):
    """Whoever still needs the logits gets autograd's error, not numbers computed from a gradient."""
    batch = random_batch(1)
    logits = batch.logits.clone().requires_grad_() * 1
    other = {
        "another loss": lambda: step_pref_loss(logits, batch.layout, backend=backend).loss,
        "pow": lambda: logits.pow(2).sum(),
        "the same loss again": lambda: None,
    }[later]()
    loss = step_pref_loss(logits, batch.layout, backend=backend, inplace_backward=True).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss if other is None else other).backward()


def test_inplace_beside_a_reader_that_needs_no_values(backend):
    batch = random_batch(1)
    grads = []
    for inplace in (False, True):
        leaf = batch.logits.clone().requires_grad_()
        logits = leaf * 1
        (
            step_pref_loss(logits, batch.layout, backend=backend, inplace_backward=inplace).loss + 0.5 * logits.sum()
        ).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_inplace_refuses_what_it_cannot_do(backend):
    batch = random_batch(1)
    expanded = batch.logits[:1].requires_grad_().expand(4, -1, -1)
    with pytest.raises(ValueError, match="inplace_backward"):
        step_pref_loss(expanded, batch.layout, backend=backend, inplace_backward=True)
    with pytest.raises(ValueError, match="inplace_backward: .*reference"):
        step_pref_loss(batch.logits, batch.layout, backend="reference", inplace_backward=True)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_second_derivative_raises(backend, inplace):
    """Liger's dual chunk and prime-rl give a wrong number here: the gradient of a loss is taken for a constant.

    The weight of a head makes it matter: d loss/d hidden depends on it through the loss's own gradient, too.
    """
    batch = random_batch(1)
    weight = torch.randn(11, 11, requires_grad=True)
    hidden = batch.logits.clone().requires_grad_()
    for outputs in (
        lambda x: step_pref_loss(x, batch.layout, backend=backend, inplace_backward=inplace).loss,
        lambda x: step_logps(x, batch.layout, backend=backend, inplace_backward=inplace).sums.sum(),
    ):
        with pytest.raises(RuntimeError, match="sspo_ext: .*backend='reference'"):
            (grad,) = torch.autograd.grad(outputs(hidden @ weight), hidden, create_graph=True)
            torch.autograd.grad(grad.pow(2).sum(), weight)


def test_no_gradient_wanted(backend):
    batch = random_batch(1)
    assert not step_pref_loss(batch.logits, batch.layout, backend=backend).loss.requires_grad
    with torch.no_grad():
        assert not step_logps(batch.logits.requires_grad_(), batch.layout, backend=backend).sums.requires_grad
    out = step_pref_loss(batch.logits, batch.layout, backend=backend)
    assert out.loss.requires_grad
    assert not out.step_logps.requires_grad and not out.pair_losses.requires_grad and not out.rewards.requires_grad
    assert not any(m.requires_grad for m in out.metrics.values())
