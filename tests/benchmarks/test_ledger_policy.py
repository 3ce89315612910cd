# SPDX-License-Identifier: Apache-2.0
"""What a policy loss launches on a GPU, counted on `meta` tensors from the public call to the end of backward.

Shown to fail: advantages gathered by torch, the upstream gradient multiplied in by torch (both
test_three_launches_forward_and_two_backward).
"""

import itertools

import pytest
import torch

pytest.importorskip("triton")
from benchmarks.kernels.ledger import record
from sspo_ext.formulas.policy import POLICY_FORMULAS
from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.policy import linear_step_policy_loss, step_policy_loss

B, T, V, H = 4, 129, 1024, 256
KINDS = [
    (name, level)
    for name, definition in POLICY_FORMULAS.items()
    for level in (("token", "step", "sequence") if definition.has_ratio else ("token",))
]


def layout(weighted):
    ids = torch.full((B, T), -1)
    ids[:, 1:] = torch.arange(T - 1) // 16
    weights = torch.full((B, T), 0.5) if weighted else None
    return StepLayout.from_step_ids(torch.zeros(B, T, dtype=torch.int64), ids, token_weights=weights).to("meta")


def arguments(name, level, *, kl=False, entropy=False, old=True, weighted=False, **more):
    steps = layout(weighted)
    rows = torch.empty(steps.num_rows, device="meta")
    given = {"loss_type": name, "importance_sampling_level": level, "kl_coef": 0.1 * kl, "entropy_coef": 0.1 * entropy}
    if old and POLICY_FORMULAS[name].has_ratio or "prob_threshold" in more:
        given["old"] = rows
    if kl:
        given["ref"] = rows
    return steps, torch.empty(steps.num_steps, device="meta"), given | more


def launched(call):
    """(launches of the forward, of the backward, ledger)"""
    with record() as ledger:
        loss = call().loss
        forward = ledger.launches
        loss.backward(torch.ones_like(loss))
    made_here = 1  # ones_like
    return forward, ledger.launches - forward - made_here, ledger


def on_logits(name, level, **more):
    steps, advantages, given = arguments(name, level, **more)
    logits = torch.empty(B, T, V, dtype=torch.bfloat16, device="meta").requires_grad_()
    return launched(lambda: step_policy_loss(logits, steps, advantages, backend="triton", **given))


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("name, level", KINDS)
def test_three_launches_forward_and_two_backward(name, level, kl, entropy):
    """Constants, log-probs, loss; then the gradient. With an entropy bonus one more multiplies by the upstream."""
    for aggregation, weighted in itertools.product(("token", "step", "sequence", "sum"), (False, True)):
        forward, backward, ledger = on_logits(
            name, level, kl=kl, entropy=entropy, aggregation=aggregation, weighted=weighted
        )
        assert forward <= 3 and backward <= 1 + entropy, (aggregation, ledger.names("rows", "torch"))
        assert not ledger.of("read back", "to device", "gemm")


@pytest.mark.parametrize(
    "more",
    [
        {"prob_threshold": 0.9},
        {"num_items": 7},
        {"num_items": torch.tensor(7.0)},
        {"num_items": torch.tensor(7, device="meta")},
        {"old": False},
        {"length_normalize": False, "importance_sampling_level": "sequence"},
        {"inplace_backward": True},
        {"aggregation": "step", "prob_threshold": 0.5},
    ],
    ids=str,
)
def test_no_option_costs_a_launch(more):
    forward, backward, ledger = on_logits("ppo", more.pop("importance_sampling_level", "token"), **more)
    assert forward <= 3 and backward <= 1, ledger.names("rows", "torch")
    assert not ledger.of("read back")


def test_one_read_and_one_write_in_all():
    """Of the logits' bytes: read once forward; read once and written once backward."""
    size = B * T * V * 2
    for entropy in (False, True):
        _, _, ledger = on_logits("ppo", "sequence", kl=True, entropy=entropy)
        moved = sum(entry.loaded + entry.stored for entry in ledger.of("rows", "torch"))
        assert 2.9 * size <= moved <= 3.1 * size


def test_metrics_and_step_log_probs_wait_until_they_are_asked_for():
    steps, advantages, given = arguments("ppo", "sequence", kl=True)
    logits = torch.empty(B, T, V, dtype=torch.bfloat16, device="meta")
    with record() as ledger:
        out = step_policy_loss(logits, steps, advantages, backend="triton", **given)
        assert ledger.launches <= 3
        assert out.step_logps is out.step_logps and out.step_logps.shape == (steps.num_steps,)
        assert 3 < ledger.launches <= 6
        assert "kl" in out.metrics


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("name, level", KINDS)
def test_linear_route(name, level, entropy):
    """Three products; beside them the same few launches for every loss: one a chunk makes its coefficients."""
    steps, advantages, given = arguments(name, level, kl=True, entropy=entropy)
    hidden = torch.empty(B, T, H, dtype=torch.bfloat16, device="meta").requires_grad_()
    weight = torch.empty(V, H, dtype=torch.bfloat16, device="meta").requires_grad_()
    forward, backward, ledger = launched(
        lambda: linear_step_policy_loss(hidden, weight, steps, advantages, backend="triton", **given)
    )
    assert len(ledger.of("gemm")) == 3 and ledger.names("rows")["_policy_loss_fwd_kernel"] == 2
    assert forward <= 20 and backward <= 2, ledger.names("rows", "torch", "gemm")
    assert not ledger.of("read back")
