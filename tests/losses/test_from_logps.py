# SPDX-License-Identifier: Apache-2.0
"""policy_loss and pref_loss from token log-probs that an engine has computed: the same as from its logits.

Mutations, each caught by the test named:
  (B, T) values taken a position early (rows in place of rows + 1)        test_policy_loss_is_that_of_the_logits
  the entropy bonus left out; its sign                                    test_policy_loss_is_that_of_the_logits
  a token of weight 0 not counted; the layout's weights kept              test_token_weights_may_be_zero
  a first column without a row; steps numbered across sequences           test_layout_of_a_response
  step ids compared with those of the sequence before                     test_messages
  the check of labels left out                                            test_losses_of_logits_refuse_it
  no _Once                                                                test_second_derivative
"""

from dataclasses import replace

import pytest
import torch
from helpers.batch import random_batch, random_pairs
from helpers.policy import AGGREGATIONS, F64, VARIANTS, problem, with_old

import sspo_ext
from sspo_ext import (
    StepLayout,
    StepLogps,
    linear_step_policy_loss,
    policy_loss,
    pref_loss,
    step_logps,
    step_policy_loss,
    step_pref_loss,
)
from sspo_ext.formulas.registry import PAIR_FORMULAS


def aligned(values, layout, fill=float("nan")):
    """(B, T) with the rows' values at their tokens, and what may stand at all others."""
    out = torch.full((layout.shape[0] * layout.shape[1],), fill, dtype=values.dtype)
    return out.index_copy(0, layout.rows + 1, values).view(layout.shape)


def response_of(batch):
    """The same tokens as the batch's layout, without labels."""
    mask = (batch.labels != -100) & (torch.arange(batch.labels.shape[1]) > 0)
    return StepLayout.from_response(mask, batch.step_ids)


def tokens_of(logits, labels):
    """(B, T): log-probs as an engine makes them, of every token but the first."""
    logp = torch.log_softmax(logits[:, :-1], -1)
    chosen = logp.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    entropy = -(logp.exp() * logp).sum(-1)
    return tuple(torch.nn.functional.pad(x, (1, 0), value=float("nan")) for x in (chosen, entropy))


@pytest.mark.parametrize("form", ["padded", "rows", "packed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_policy_loss_is_that_of_the_logits(variant, form):
    """Every variant, aggregation and common option; loss, metrics and the gradient at the logits."""
    batch, layout, advantages, old, ref = problem(seed=3)
    response = response_of(batch)
    assert (response.rows == layout.rows).all() and response.labels.numel() == 0
    if form == "packed":
        total = batch.labels.numel()
        cu = torch.arange(0, total + 1, batch.labels.shape[1])
        mask = torch.zeros(total, dtype=torch.bool).index_fill(0, layout.rows + 1, True)
        response = StepLayout.from_response(mask, batch.step_ids.reshape(-1), cu_seqlens=cu)
    elif form == "rows":
        response = layout
    for aggregation in AGGREGATIONS:
        common = {"aggregation": aggregation, "ref": ref, "kl_coef": 0.3, "kl_estimator": "k2", "entropy_coef": 0.1,
                  "num_items": 7.0 if aggregation == "sum" else None, **with_old(VARIANTS[variant], old)}  # fmt: skip
        if "old" in common and aggregation == "token":
            common["prob_threshold"] = 0.4
        for backend in ("reference", "cpu"):
            leaf = batch.logits.clone().requires_grad_()
            want = step_policy_loss(leaf, layout, advantages, backend=backend, **common)
            (want.loss * 1.7).backward()
            expected, leaf.grad = leaf.grad, None
            tokens, entropy = tokens_of(leaf, batch.labels)
            if form == "rows":
                tokens, entropy = (x.reshape(-1)[layout.rows + 1] for x in (tokens, entropy))
            elif form == "packed":
                tokens, entropy = tokens.reshape(-1), entropy.reshape(-1)
            else:
                common |= {"ref": aligned(ref, layout)}
            got = policy_loss(tokens, response, advantages, entropy=entropy, backend=backend, **common)
            torch.testing.assert_close(got.loss, want.loss, rtol=1e-10, atol=1e-12)
            (got.loss * 1.7).backward()
            seen = torch.zeros(leaf.shape[0] * leaf.shape[1], dtype=torch.bool).index_fill(0, layout.rows, True)
            seen = seen.view(leaf.shape[:2])
            # softmax's own backward turns the NaN of tokens that are not read into nothing: their gradient is 0
            torch.testing.assert_close(leaf.grad[seen], expected[seen], rtol=1e-8, atol=1e-12)
            assert leaf.grad[~seen].abs().max() == 0 and expected.abs().max() > 0
            for key, value in want.metrics.items():
                torch.testing.assert_close(got.metrics[key], value, rtol=1e-8, atol=1e-12, msg=key)


@pytest.mark.parametrize("formula", PAIR_FORMULAS)
def test_pref_loss_is_that_of_the_logits(formula):
    batch = random_batch(11, dtype=F64)
    layout, response = batch.layout, response_of(batch)
    pairs = random_pairs(layout, 5, weights=torch.rand(2 * layout.num_steps))
    ref = None if PAIR_FORMULAS[formula].reference == "forbidden" else torch.rand(layout.num_rows, dtype=F64) - 3
    options = {"loss_type": formula, "ref": ref, "num_items": 5.0}
    if formula == "exo_pair":
        options["label_smoothing"] = 0.1
    leaf = batch.logits.clone().requires_grad_()
    want = step_pref_loss(leaf, layout, pairs, **options)
    (expected,) = torch.autograd.grad(want.loss, leaf)
    got = pref_loss(tokens_of(leaf, batch.labels)[0], response, pairs, **options)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-9, atol=1e-12)
    (gradient,) = torch.autograd.grad(got.loss, leaf)
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-12)
    for key, value in want.metrics.items():
        torch.testing.assert_close(got.metrics[key], value, rtol=1e-8, atol=1e-12, msg=key)


def test_token_weights_may_be_zero():
    """An importance weight of 0 silences a token that counts; weights replace the layout's own."""
    logps = torch.tensor([[-1.0, -2.0, -3.0, -4.0]], dtype=F64, requires_grad=True)
    layout = StepLayout.from_response(torch.ones(1, 4))
    weights = torch.tensor([[0.0, 0.5, 2.0, 0.0]], dtype=F64)
    for aggregation, divisor in (("token", 4), ("step", 4), ("sequence", 4), ("sum", 1)):
        for backend in ("reference", "cpu"):
            for given in (layout, replace(layout, weights=torch.full((4,), 7.0))):
                out = policy_loss(
                    logps, given, torch.tensor([3.0]), token_weights=weights, aggregation=aggregation, backend=backend
                )
                (gradient,) = torch.autograd.grad(out.loss, logps)
                torch.testing.assert_close(gradient, -3 * weights / divisor)


def test_bfloat16_is_widened():
    logps = torch.full((1, 3), -1.0, dtype=torch.bfloat16, requires_grad=True)
    out = policy_loss(logps, StepLayout.from_response(torch.ones(1, 3)), torch.tensor([1.0]))
    assert out.loss.dtype == torch.float32
    out.loss.backward()
    assert logps.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("seed", range(6))
def test_layout_of_a_response(seed):
    """Padded and packed: the steps of `from_step_ids`, with the first column scored as well."""
    batch = random_batch(seed, B=5, T=9)
    mask = batch.labels != -100
    got = StepLayout.from_response(mask, batch.step_ids)
    # a column before the first, so that `from_step_ids` has a row for every token
    labels, ids = (torch.nn.functional.pad(x, (1, 0), value=v) for x, v in ((batch.labels, -100), (batch.step_ids, -1)))
    want = StepLayout.from_step_ids(labels, ids)
    same = ("step_offsets", "step_of_row", "step_sequence", "sequence_offsets", "host_step_offsets",
            "host_step_sequence", "host_sequence_offsets")  # fmt: skip
    flat = ((want.rows + 1) // 10) * 9 + (want.rows + 1) % 10 - 1
    cu = torch.tensor([0, 9, 18, 27, 36, 45])
    packed = StepLayout.from_response(mask.reshape(-1), batch.step_ids.reshape(-1), cu_seqlens=cu)
    for layout in (got, packed):
        assert (layout.rows + 1 == flat).all() and layout.one_row_per_step == want.one_row_per_step
        assert layout.num_sequences == 5
        for name in same:
            assert torch.equal(getattr(layout, name), getattr(want, name)), name
    assert got.shape == (5, 9) and packed.shape == (1, 45)


def test_without_step_ids_a_sequence_is_a_step():
    layout = StepLayout.from_response(torch.tensor([[1, 0, 1], [0, 0, 0]]))
    assert layout.counts.tolist() == [2, 0] and layout.step_sequence.tolist() == [0, 1]
    logps = torch.zeros(2, 3, requires_grad=True)
    assert policy_loss(logps, layout, torch.ones(2, 3)).loss == 0


def test_nothing_to_score():
    layout = StepLayout.from_response(torch.zeros(2, 3), torch.full((2, 3), -1))
    logps = torch.zeros(2, 3, requires_grad=True)
    out = policy_loss(logps, layout, torch.zeros(0))
    out.loss.backward()
    assert out.loss == 0 and logps.grad.abs().max() == 0 and out.metrics["tokens/count"] == 0


def test_losses_of_logits_refuse_it():
    layout = StepLayout.from_response(torch.ones(2, 4))
    logits = torch.randn(2, 4, 5)
    calls = (
        lambda: step_policy_loss(logits, layout, torch.ones(2)),
        lambda: step_logps(logits, layout),
        lambda: linear_step_policy_loss(torch.randn(2, 4, 3), torch.randn(5, 3), layout, torch.ones(2)),
    )
    for call in calls:
        with pytest.raises(ValueError, match="^layout: expected one with labels .* StepLayout.from_response"):
            call()


def test_second_derivative():
    """Refused where a kernel knows only the first, right on the reference."""
    layout = StepLayout.from_response(torch.ones(1, 3))
    logps = torch.tensor([[-1.0, -0.5, -2.0]], dtype=F64, requires_grad=True)
    options = {"old": logps.detach() - 0.1, "loss_type": "ppo"}
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(
            policy_loss(logps, layout, torch.ones(1), backend="cpu", **options).loss, logps, create_graph=True
        )

    def loss(x):
        return policy_loss(x, layout, torch.ones(1), backend="reference", **options).loss

    assert torch.autograd.gradgradcheck(loss, logps)


def test_compiles_to_one_graph():
    layout = StepLayout.from_response(torch.ones(2, 5), torch.tensor([[0, 0, 1, 1, -1], [0, 1, 1, 2, 2]]))
    logps, advantages = torch.randn(2, 5), torch.randn(layout.num_steps)

    def loss(x):
        return policy_loss(x, layout, advantages, old=logps, loss_type="ppo", importance_sampling_level="step").loss

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    found = []
    for fn in (loss, compiled):
        leaf = (logps + 0.1).requires_grad_()
        fn(leaf).backward()
        found.append(leaf.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda L, x, A: policy_loss(x[:, :2], L, A), ValueError, "logps: expected shape"),
        (lambda L, x, A: policy_loss(x[0], L, A), ValueError, r"logps: expected \(5,\) rows or \(2, 3\) tokens"),
        (lambda L, x, A: policy_loss(x.long(), L, A), TypeError, "logps: expected a tensor of float32"),
        (lambda L, x, A: policy_loss(x, (L,), A), TypeError, "layout: expected a StepLayout"),
        (lambda L, x, A: policy_loss(x, L, A, entropy_coef=0.1), ValueError, "entropy: expected it for entropy_coef"),
        (lambda L, x, A: policy_loss(x, L, A, entropy=x[:1]), ValueError, "entropy: expected shape"),
        (lambda L, x, A: policy_loss(StepLogps.from_tokens(x, L), L, A, entropy=x), TypeError, "entropy: given beside"),
        (lambda L, x, A: policy_loss(x, L, A, token_weights=x[:1]), ValueError, "token_weights: expected shape"),
        (lambda L, x, A: policy_loss(x, L, A[:1]), ValueError, "advantages: expected"),
        (lambda L, x, A: StepLayout.from_response(x[0]), ValueError, "mask: expected 2 dimensions"),
        (lambda L, x, A: StepLayout.from_response(x, x), TypeError, "step_ids: expected an integer"),
        (lambda L, x, A: StepLayout.from_response(x, torch.tensor([[0, 1, 1], [1, 0, 1]])), ValueError,
         "step_ids: expected ids that never go back along a sequence, got 0 in sequence 1 at position 1"),
        (lambda L, x, A: StepLayout.from_response(x, torch.tensor([[0, 1, 1], [0, 0, 3]])), ValueError,
         "step_ids: expected ids below the longest sequence's length 3, got 3 in sequence 1 at position 2"),
        (lambda L, x, A: StepLayout.from_response(x, torch.tensor([[0, -2, 1], [0, 0, 1]])), ValueError,
         "step_ids: expected 0, 1, 2, ... or -1"),
        (lambda L, x, A: StepLayout.from_response(x[0], cu_seqlens=torch.tensor([0, 2])), ValueError,
         "cu_seqlens: expected 0 <= ... <= 3"),
    ],
)  # fmt: skip
def test_messages(call, error, message):
    layout = StepLayout.from_response(torch.tensor([[1, 1, 1], [1, 1, 0]]), torch.tensor([[0, 1, 1], [0, 0, 0]]))
    with pytest.raises(error, match=f"^{message}"):
        call(layout, torch.ones(2, 3), torch.ones(layout.num_steps))


def test_public_names():
    assert sspo_ext.policy_loss is policy_loss and "policy_loss" in sspo_ext.__all__
