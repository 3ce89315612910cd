# SPDX-License-Identifier: Apache-2.0
"""Advantages on padded tensors: token by token those of the list forms, and nothing waits for a device.

Mutations, each caught by the test named:
  the value at a step's last token; V_k for V_{k-1} of StepValues           test_step_gae_token_by_token
  a step without tokens counted; number of a token after the first step     test_step_gae_token_by_token
  rewards of tokens between steps lost; a step's last reward alone          test_rewards_of_tokens
  statistics over tokens, or with the padding                               test_normalize_over_steps
  group_index by torch.unique; a check that reads a value                   test_nothing_waits
"""

import pytest
import torch
from helpers.batch import random_batch
from helpers.no_sync import NoSync

from sspo_ext import StepLayout
from sspo_ext.signals import (
    BASELINES,
    StepValues,
    combine_advantages,
    combine_advantages_tokens,
    outcome_advantages,
    step_gae,
    step_gae_tokens,
    steps_to_tokens,
)


def problem(seed, B=6, T=14):
    """Step ids (with gaps, skipped ids and sequences without steps), their values in both forms, and rewards."""
    g = torch.Generator().manual_seed(seed)
    ids = random_batch(seed, B, T).step_ids
    ids[torch.rand(B, T, generator=g) < 0.15] = -1
    ids[seed % B] = -1
    lists, tokens = [], torch.full((B, T), float("nan"))
    for b in range(B):
        steps = [k for k in ids[b].unique().tolist() if k >= 0]
        values = torch.rand(len(steps) + 1, generator=g).tolist()
        for k, value in zip(steps, values, strict=False):
            tokens[b, int((ids[b] == k).nonzero()[0])] = value
        lists.append(values)
    return ids, StepValues.from_lists(lists), tokens, torch.rand(B, generator=g) - 0.3


def by_hand(ids, per_step):
    """(B, T) from (S,), one token at a time; skipped ids are no steps."""
    out, s = torch.zeros(ids.shape, dtype=per_step.dtype), 0
    for b in range(len(ids)):
        for k in [k for k in ids[b].unique().tolist() if k >= 0]:
            out[b, ids[b] == k] = per_step[s]
            s += 1
    assert s == len(per_step)
    return out


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.95, 0.9), (1.0, 0.0), (0.0, 0.5)])
def test_step_gae_token_by_token(seed, gamma, lam):
    """Bitwise the list form, from values at tokens and from StepValues; NaN at tokens that are not read."""
    ids, values, tokens, rewards = problem(seed)
    want = by_hand(ids, step_gae(values, rewards, gamma=gamma, lam=lam))
    for given in (tokens, values):
        got = step_gae_tokens(given, rewards, ids, gamma=gamma, lam=lam)
        assert torch.equal(got, want)
    assert step_gae_tokens(tokens.double(), rewards, ids).dtype == torch.float64


def test_worked_out_by_hand():
    """gamma = 1/2, lam = 1/2, V = 0.5, 0.25 and R = 1: A_2 = 1 - 0.25, A_1 = 0.125 - 0.5 + A_2 / 4."""
    ids = torch.tensor([[-1, 0, -1, 0, 2, 2, -1]])
    values = torch.tensor([[0, 0.5, 0, 0, 0.25, 0, 0]])
    got = step_gae_tokens(values, torch.tensor([1.0]), ids, gamma=0.5, lam=0.5)
    assert got.tolist() == [[0, -0.1875, 0, -0.1875, 0.75, 0.75, 0]]


@pytest.mark.parametrize("seed", range(4))
def test_rewards_of_tokens(seed):
    """A step gets its tokens' rewards and those of what follows it; those before the first step are dropped."""
    ids, values, tokens, outcome = problem(seed)
    g = torch.Generator().manual_seed(seed)
    rewards = torch.rand(ids.shape, generator=g)
    running = ids.cummax(1).values
    per_step = [rewards[b, running[b] == k].sum() for b in range(len(ids)) for k in ids[b].unique() if k >= 0]
    want = step_gae(values, torch.zeros(len(ids)), gamma=0.9, lam=0.8, step_rewards=torch.stack(per_step))
    got = step_gae_tokens(tokens, rewards, ids, gamma=0.9, lam=0.8)
    torch.testing.assert_close(got, by_hand(ids, want), rtol=1e-5, atol=1e-6)
    at_the_end = torch.zeros(ids.shape)
    at_the_end[:, -1] = outcome
    want = step_gae_tokens(tokens, outcome, ids, gamma=0.9, lam=0.8)
    torch.testing.assert_close(step_gae_tokens(tokens, at_the_end, ids, gamma=0.9, lam=0.8), want)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("normalize", ["batch", "group"])
def test_normalize_over_steps(seed, normalize):
    ids, values, tokens, rewards = problem(seed)
    groups = torch.tensor([7, 7, -2, 7, -2, 30]) if normalize == "group" else None
    want = step_gae(values, rewards, gamma=0.9, lam=0.8, normalize=normalize, groups=groups)
    got = step_gae_tokens(tokens, rewards, ids, gamma=0.9, lam=0.8, normalize=normalize, groups=groups)
    torch.testing.assert_close(got, by_hand(ids, want), rtol=1e-6, atol=1e-7)
    assert got.abs().max() > 0


@pytest.mark.parametrize("seed", range(4))
def test_steps_to_tokens(seed):
    """The numbers of a StepLayout's steps, empty ones included; or a grid."""
    batch = random_batch(seed)
    layout = StepLayout.from_response(batch.step_ids >= 0, batch.step_ids)
    per_step = torch.rand(layout.num_steps, requires_grad=True)
    got = steps_to_tokens(per_step, batch.step_ids)
    want = torch.zeros(batch.step_ids.numel()).index_copy(0, layout.rows + 1, per_step[layout.step_of_row])
    assert torch.equal(got.reshape(-1), want)
    counts = torch.bincount(layout.host_step_sequence, minlength=4).tolist()
    grid = torch.nn.utils.rnn.pad_sequence(per_step.split(counts), batch_first=True)
    assert torch.equal(steps_to_tokens(grid, batch.step_ids), got)
    got.sum().backward()
    assert torch.equal(per_step.grad, layout.counts.float())


@pytest.mark.parametrize("how", ["add", "multiply", "replace"])
def test_combine_token_by_token(how):
    ids, values, tokens, rewards = problem(1)
    steps, scales = step_gae(values, rewards, lam=0.9), {"step_scale": 0.5, "outcome_scale": 2.0}
    outcome = outcome_advantages(rewards, "grpo", groups=torch.tensor([5, 5, 5, 1, 1, 1]))
    want = by_hand(ids, combine_advantages(steps, outcome, values.step_sequence, how, **scales))
    got = combine_advantages_tokens(step_gae_tokens(tokens, rewards, ids, lam=0.9), outcome, ids, how, **scales)
    assert torch.equal(got, want)


def everything(ids, values, tokens, rewards):
    groups = torch.arange(len(ids), device=ids.device) // 2
    for given in (tokens, values):
        for options in ({}, {"normalize": "batch"}, {"normalize": "group", "groups": groups}):
            steps = step_gae_tokens(given, rewards, ids, gamma=0.9, lam=0.8, **options)
    step_gae_tokens(tokens, torch.zeros_like(tokens), ids)
    for name in BASELINES:
        outcome = outcome_advantages(rewards, name, groups=groups)
        combine_advantages_tokens(steps, outcome, ids)
    return steps_to_tokens(torch.zeros(len(ids) * ids.shape[1], device=ids.device), ids)


def test_nothing_waits(monkeypatch):
    """No value is read: neither by an operation on the CPU nor on a device that has none.

    The checks that read values belong to the CPU, so the first part runs without them.
    """
    ids, values, tokens, rewards = (x.to("meta") for x in problem(2))
    assert everything(ids, values, tokens, rewards).shape == ids.shape
    on_host = problem(2)
    with NoSync():
        monkeypatch.setattr(torch.Tensor, "device", property(lambda self: torch.device("meta")))
        monkeypatch.setattr(torch, "arange", lambda *a, device=None, _arange=torch.arange: _arange(*a))
        monkeypatch.setattr(torch, "zeros", lambda *a, device=None, _zeros=torch.zeros: _zeros(*a))
        everything(*on_host)


@pytest.mark.parametrize("wait", [lambda x: x.nonzero(), lambda x: x.max().item(), lambda x: x[x > 0], torch.unique])
def test_the_mode_sees_what_waits(wait):
    with pytest.raises(AssertionError, match="waits for the device"), NoSync():
        wait(torch.ones(3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda i, v, t, r: step_gae_tokens(t[:, 1:], r, i), ValueError, "values: expected shape"),
        (lambda i, v, t, r: step_gae_tokens([1.0], r, i), TypeError, r"values: expected \(B, T\) values or"),
        (lambda i, v, t, r: step_gae_tokens(v, r[1:], i[1:]), ValueError, "values: expected those of 5 sequences"),
        (lambda i, v, t, r: step_gae_tokens(v, r, i.clamp(max=0)), ValueError, "values: expected those of .* steps"),
        (lambda i, v, t, r: step_gae_tokens(t, r[1:], i), ValueError, "rewards: expected shape"),
        (lambda i, v, t, r: step_gae_tokens(t, r, i.float()), TypeError, "step_ids: expected an integer"),
        (lambda i, v, t, r: step_gae_tokens(t, r, i, gamma=2), ValueError, "gamma: expected a number in"),
        (lambda i, v, t, r: step_gae_tokens(t, r, i, groups=i[:, 0]), ValueError, "groups: expected with"),
        (lambda i, v, t, r: steps_to_tokens(r[:1], i), ValueError, "per_step: expected numbers of"),
        (lambda i, v, t, r: steps_to_tokens(t[:, :1], i), ValueError, "per_step: expected numbers of"),
        (lambda i, v, t, r: combine_advantages_tokens(t, r, i, "sum"), ValueError, "how: expected one of"),
        (lambda i, v, t, r: combine_advantages_tokens(t, r[1:], i), ValueError, "outcome_advantages: expected shape"),
    ],
)
def test_messages(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call(*problem(0))
