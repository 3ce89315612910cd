# SPDX-License-Identifier: Apache-2.0
"""What must hold for any batch, found out by hypothesis: invariances, conservation, finite differences.

Mutations, each caught by the test named (on a copy of the package):
  a pack's positions counted over the whole pack  test_packing_order_changes_nothing
  logits not normalised                           test_a_constant_added_to_a_row_changes_nothing
  a step is its last row                          test_sums_over_steps_are_the_sequence_sum
  backward without the temperature                test_finite_differences
  the other half of the soft label lost           test_swapping_a_pair_with_its_soft_label
"""

import pytest
import torch
import torch.nn.functional as F
from helpers.batch import Batch, fused_backends, pack, random_batch, random_pairs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sspo_ext.layout.pairs import StepPairs
from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.logps import step_logps
from sspo_ext.losses.pref import step_pref_loss

# the compiled kernels and the specification; the interpreter is too slow to be asked hundreds of times
BACKENDS = ["reference"] + [b for b in fused_backends() if b != "triton"]
EXAMPLES = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

sizes = st.tuples(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 14), st.integers(1, 33), st.booleans())
losses = st.sampled_from(["sigmoid", "hinge", "ipo", "simpo"])
logistic = st.sampled_from(["sigmoid", "simpo"])


def make(size, dtype=torch.float32) -> Batch:
    seed, B, T, V, weighted = size
    return random_batch(seed, B, T, V, weighted=weighted, dtype=dtype)


def pairs_for(layout: StepLayout, seed: int) -> StepPairs:
    if layout.num_steps < 2:
        return StepPairs.from_index(layout, torch.zeros(0, 2, dtype=torch.long))
    return random_pairs(layout, seed, P=min(layout.num_steps, 6))


def run(logits, layout, pairs, any_backend, **kw):
    leaf = logits.detach().clone().requires_grad_()
    out = step_pref_loss(leaf, layout, pairs, backend=any_backend, **kw)
    out.loss.backward()
    return out, leaf.grad


@pytest.mark.parametrize("any_backend", BACKENDS)
@given(size=sizes, loss_type=losses, more=st.integers(1, 9))
@EXAMPLES
def test_padding_changes_nothing(any_backend, size, loss_type, more):
    """Positions added on the right, full of NaN and of labels that are not scored: the same bits."""
    batch = make(size)
    layout = batch.layout
    pairs = pairs_for(layout, size[0])
    want, grad = run(batch.logits, layout, pairs, any_backend, loss_type=loss_type)
    weights = None if batch.token_weights is None else F.pad(batch.token_weights, (0, more), value=1.0)
    padded = Batch(
        F.pad(batch.logits, (0, 0, 0, more), value=float("nan")),
        F.pad(batch.labels, (0, more), value=-100),
        F.pad(batch.step_ids, (0, more), value=-1),
        weights,
    )
    T = batch.labels.shape[1]
    padded.logits[:, T - 1] = batch.logits[:, T - 1]
    got, padded_grad = run(
        padded.logits, padded.layout, pairs_for(padded.layout, size[0]), any_backend, loss_type=loss_type
    )
    assert torch.equal(got.loss, want.loss) and torch.equal(got.step_logps, want.step_logps)
    assert torch.equal(padded_grad[:, :T], grad) and (padded_grad[:, T:] == 0).all()


@pytest.mark.parametrize("any_backend", BACKENDS)
@given(size=sizes, data=st.data())
@EXAMPLES
def test_packing_order_changes_nothing(any_backend, size, data):
    """Sequences packed in any order: each step's sum and the loss of the same pairs are the same bits."""
    batch = make(size)
    B, V = len(batch.labels), batch.logits.shape[-1]
    order = data.draw(st.permutations(range(B)))
    shuffled = Batch(
        batch.logits[order],
        batch.labels[order],
        batch.step_ids[order],
        None if batch.token_weights is None else batch.token_weights[order],
    )
    layout = batch.layout
    pairs = pairs_for(layout, size[0])
    want, want_grad = run(batch.logits, layout, pairs, any_backend)
    logits, packed, _, cu = pack(shuffled)
    # where each step of the original went
    first = torch.searchsorted(layout.host_step_sequence, torch.arange(B))
    there = torch.searchsorted(packed.host_step_sequence, torch.arange(B))
    rank = torch.argsort(torch.tensor(order))
    moved = there[rank[layout.host_step_sequence]] + torch.arange(layout.num_steps) - first[layout.host_step_sequence]
    got, grad = run(logits, packed, StepPairs.from_index(packed, moved[pairs.index.long()]), any_backend)
    assert torch.equal(got.step_logps[moved], want.step_logps)
    assert torch.equal(got.pair_losses, want.pair_losses) and torch.equal(got.loss, want.loss)
    for b in range(B):
        at = int(rank[b])
        length = int(cu[at + 1] - cu[at])
        torch.testing.assert_close(grad[cu[at] : cu[at + 1]], want_grad[b, :length], rtol=1e-6, atol=1e-9)
    assert grad.shape == (int(cu[-1]), V)


@pytest.mark.parametrize("any_backend", BACKENDS)
@given(size=sizes, constant=st.floats(-50, 50))
@EXAMPLES
def test_a_constant_added_to_a_row_changes_nothing(any_backend, size, constant):
    batch = make(size, torch.float64)
    layout = batch.layout
    pairs = pairs_for(layout, size[0])
    want, grad = run(batch.logits, layout, pairs, any_backend)
    shift = constant * torch.randn(
        batch.labels.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(size[0])
    )
    got, shifted_grad = run(batch.logits + shift[..., None], layout, pairs, any_backend)
    torch.testing.assert_close(got.step_logps, want.step_logps, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(shifted_grad, grad, rtol=1e-8, atol=1e-10)
    # and so a row's gradient sums to zero
    assert grad.sum(-1).abs().max() < 1e-12


@pytest.mark.parametrize("any_backend", BACKENDS)
@given(size=sizes)
@EXAMPLES
def test_sums_over_steps_are_the_sequence_sum(any_backend, size):
    """One step per sequence instead of many: the same tokens, the same total."""
    batch = make(size)
    layout = batch.layout
    steps = step_logps(batch.logits, layout, backend=any_backend)
    one = Batch(batch.logits, batch.labels, batch.step_ids.clamp(max=0), batch.token_weights)
    whole = step_logps(batch.logits, one.layout, backend=any_backend)
    by_sequence = torch.zeros(len(batch.labels)).index_add(0, layout.step_sequence.long(), steps.sums)
    want = torch.zeros(len(batch.labels)).index_add(0, one.layout.step_sequence.long(), whole.sums)
    torch.testing.assert_close(by_sequence, want, rtol=1e-5, atol=1e-5)
    assert (
        torch.equal(steps.tokens, whole.tokens)
        and int(steps.counts.sum()) == int(whole.counts.sum()) == layout.num_rows
    )
    assert (steps.tokens <= 0).all(), "no log-probability above 0 (verl#2656)"


@pytest.mark.parametrize("any_backend", BACKENDS)
@given(size=sizes, loss_type=losses, direction=st.integers(0, 10**6))
@EXAMPLES
def test_finite_differences(any_backend, size, loss_type, direction):
    """The gradient along a random direction, on a random layout, against a central difference in float64."""
    batch = make(size, torch.float64)
    layout = batch.layout
    pairs = pairs_for(layout, size[0])
    kw = {"loss_type": loss_type, "temperature": 0.8, "logit_softcap": 9.0, "beta": 0.2}
    _, grad = run(batch.logits, layout, pairs, any_backend, **kw)
    step = torch.randn(batch.logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(direction))
    eps = 1e-5

    def loss(logits):
        out = step_pref_loss(logits, layout, pairs, backend=any_backend, **kw)
        return out

    up, down = loss(batch.logits + eps * step), loss(batch.logits - eps * step)
    if loss_type == "hinge" and ((up.pair_losses > 0) != (down.pair_losses > 0)).any():
        return  # a kink between the two
    difference = (up.loss - down.loss).item() / (2 * eps)
    assert difference == pytest.approx((grad * step).sum().item(), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("any_backend", BACKENDS)
@given(size=sizes, loss_type=logistic)
@EXAMPLES
def test_swapping_a_pair_with_its_soft_label(any_backend, size, loss_type):
    """Logistic losses: (winner, loser, q) and (loser, winner, 1 - q) say the same. The margin turns with the order."""
    batch = make(size)
    layout = batch.layout
    pairs = pairs_for(layout, size[0])
    g = torch.Generator().manual_seed(size[0])
    q, margins = torch.rand(pairs.num_pairs, generator=g), torch.randn(pairs.num_pairs, generator=g)
    kw = {"loss_type": loss_type, **({"simpo_gamma": 0.0} if loss_type == "simpo" else {})}
    want, grad = run(batch.logits, layout, pairs, any_backend, soft_labels=q, margins=margins, **kw)
    turned = StepPairs.from_index(layout, pairs.index.flip(1))
    got, turned_grad = run(batch.logits, layout, turned, any_backend, soft_labels=1 - q, margins=-margins, **kw)
    torch.testing.assert_close(got.pair_losses, want.pair_losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(turned_grad, grad, rtol=1e-4, atol=1e-6)
