# SPDX-License-Identifier: Apache-2.0
"""torch.set_default_device names another device than the tensors': nothing here may follow it.

"meta" stands for a GPU: whatever is made without a device meets a host tensor there, and raises. A host kernel that
was given such a tensor's address would write to address 0, or on a GPU into its memory.

Mutations, each caught by the test named:
  positions in StepGrid without a device     test_functions_of_log_probs_stay_where_they_are
  as_tensor of the pairs                     test_losses_stay_where_the_tensors_are
  outputs of the host kernels, no device     test_host_kernels_write_to_the_host (a crash)
"""

import pytest
import torch
from helpers.batch import random_batch
from helpers.loss_calls import calls

from sspo_ext.layout.pairs import StepPairs
from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.common import LOSS_FUNCTIONS
from sspo_ext.losses.logps import linear_step_logps, step_logps
from sspo_ext.losses.policy import linear_step_policy_loss, step_policy_loss
from sspo_ext.losses.pref import linear_step_pref_loss, pref_loss, step_pref_loss
from sspo_ext.losses.tokens import wpo_weights
from sspo_ext.objective.sums import StepLogps
from sspo_ext.signals.pairing.pairs import divergence_weights

H = 6
BATCH = random_batch(1)
LAYOUT = BATCH.layout
PAIRS = LAYOUT.pair_by_index()
G = torch.Generator().manual_seed(0)
X, W = torch.randn(*BATCH.labels.shape, H, generator=G), torch.randn(BATCH.logits.shape[-1], H, generator=G)
ADVANTAGES, OLD = torch.randn(LAYOUT.num_steps, generator=G), -torch.rand(LAYOUT.num_rows, generator=G)
EVERYTHING = {"entropy": True, "sum_p2": True}
POLICY = {"old": OLD, "loss_type": "ppo", "entropy_coef": 0.1}
LOGPS = step_logps(BATCH.logits, LAYOUT, kl_ref_logits=BATCH.logits * 0.5, **EVERYTHING)

CALLS = {
    "plain tensors": lambda z, x, w: step_pref_loss(z, BATCH.labels, BATCH.step_ids).loss,
    "step_pref_loss": lambda z, x, w: step_pref_loss(z, LAYOUT, PAIRS, loss_type=["sigmoid", "sft"], num_items=3).loss,
    "in place": lambda z, x, w: step_pref_loss(z * 1, LAYOUT, inplace_backward=True).loss,
    "reference": lambda z, x, w: step_pref_loss(z, LAYOUT, backend="reference").loss,
    "step_logps": lambda z, x, w: step_logps(z, LAYOUT).sums.sum(),
    "reductions": lambda z, x, w: step_logps(z, LAYOUT, kl_ref_logits=BATCH.logits, **EVERYTHING).kl.sum(),
    "linear_step_pref_loss": lambda z, x, w: linear_step_pref_loss(x, w, LAYOUT, ref=LOGPS).loss,
    "linear_step_logps": lambda z, x, w: linear_step_logps(x, w, LAYOUT).sums.sum(),
    "linear reductions": lambda z, x, w: linear_step_logps(x, w, LAYOUT, kl_ref_hidden=X, **EVERYTHING).kl.sum(),
    **{
        f"{route}policy, {level}": lambda z, x, w, route=route, level=level: (
            (
                linear_step_policy_loss(
                    x, w, LAYOUT, ADVANTAGES, chunk_bytes=300, importance_sampling_level=level, **POLICY
                )
                if route
                else step_policy_loss(z, LAYOUT, ADVANTAGES, importance_sampling_level=level, num_items=3, **POLICY)
            ).loss
        )
        for route in ("", "linear ")
        for level in ("token", "step", "sequence")
    },
}


@pytest.mark.parametrize("name", CALLS)
def test_losses_stay_where_the_tensors_are(name):
    results = []
    for device in ("cpu", "meta"):
        leaves = [t.clone().requires_grad_() for t in (BATCH.logits, X, W)]
        with torch.device(device):
            loss = CALLS[name](*leaves)
            loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", LOSS_FUNCTIONS)
def test_functions_of_log_probs_stay_where_they_are(name):
    call = calls(LAYOUT, torch.Generator().manual_seed(0))[name]
    want = call(LOGPS).loss
    with torch.device("meta"):
        assert torch.equal(call(LOGPS).loss, want)


def test_host_kernels_write_to_the_host():
    """Called without torch's dispatcher, which happens to hide the default device from an op."""
    cpu = pytest.importorskip("sspo_ext.backends.cpu")
    if cpu.why_not(torch.device("cpu"), torch.float32):
        pytest.skip("the C++ kernels are not built")
    args = (BATCH.logits, LAYOUT.rows, LAYOUT.labels)
    with torch.device("meta"):
        made = [*cpu.token_logp_fwd(*args, 1.0, 0.0), *cpu.row_reductions_fwd(*args, None, 1.0, 0.0)]
        made.append(cpu.empty((2, 3), torch.float32))
    assert all(t.device.type == "cpu" for t in made)


def test_helpers_stay_where_the_tensors_are():
    labels, steps = torch.tensor([[9, 4, 5, 6], [9, 4, 7, 6]]), torch.tensor([[-1, 0, 0, 0]] * 2)
    pairs, weights = torch.tensor([[0, 1]]), torch.ones(PAIRS.num_pairs)
    with torch.device("meta"):
        layout = StepLayout.from_step_ids(BATCH.labels, BATCH.step_ids)
        made = layout.pair_by_index().with_values(weights=weights)
        assert torch.equal(made.index, PAIRS.index) and made.mean_scale == PAIRS.mean_scale
        for index in (PAIRS.index, PAIRS.index.tolist()):
            assert torch.equal(StepPairs.from_index(layout, index).index, PAIRS.index)
        assert pref_loss(LOGPS, layout, made, ref=LOGPS).loss.device.type == "cpu"
        assert wpo_weights(LOGPS, layout, made).device.type == "cpu"
        assert isinstance(LOGPS, StepLogps) and made.units().shape == (layout.num_steps,)
        assert divergence_weights(labels, steps, pairs).tolist() == [[0, 0, 1, 0]] * 2
