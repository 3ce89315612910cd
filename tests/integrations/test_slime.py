# SPDX-License-Identifier: Apache-2.0
"""The adapter for slime: its calls as recorded from slime's source, its loss by the formula, what it refuses."""

import inspect
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers.engine_batch import REWARDS, at_starts, by_lists
from helpers.recorded import Record

from sspo_ext.integrations import slime


def test_slime(batch):
    values, lengths = at_starts(batch.ids), [7, 5, 7, 6]
    outcome = torch.tensor([0.5, -0.5, 0.7, -0.7])
    data = {
        "values": [v[:n] for v, n in zip(values, lengths, strict=True)], "rewards": outcome.tolist(),
        "raw_reward": REWARDS.tolist(), "loss_masks": [m[:n].int() for m, n in zip(batch.mask, lengths, strict=True)],
    }  # fmt: skip
    slime.step_advantage(SimpleNamespace(gamma=0.9, lambd=0.8), data)
    want = by_lists(batch.ids, outcome)
    for name in ("advantages", "returns"):
        assert [len(row) for row in data[name]] == lengths
        for got, row, n in zip(data[name], want, lengths, strict=True):
            torch.testing.assert_close(got, row[:n], rtol=1e-6, atol=1e-6)


SLIME = Record("slime-624b824a.txt")
SLIMES_LOSS = "slime/backends/megatron_utils/loss.py"


def slimes_args(**options):
    defaults = {"eps_clip": 0.2, "eps_clip_high": 0.3, "eps_clip_c": 3.0, "entropy_coef": 0.01}
    return SimpleNamespace(**{**defaults, "use_rollout_logprobs": False, **options})


@pytest.fixture
def slimes(batch, monkeypatch):
    """slime's batch of the four rows, and its module with log-probs that are a function of the logits."""
    lengths = [7, 5, 7, 6]

    @SLIME.follows(f"{SLIMES_LOSS}:get_log_probs_and_entropy")
    def get_log_probs_and_entropy(logits, **given):
        assert given["with_entropy"] and given["response_lengths"] == lengths
        rows = logits[0, :, 0].split(lengths)
        return None, {"log_probs": list(rows), "entropy": [0.1 * row for row in rows]}

    @SLIME.follows(f"{SLIMES_LOSS}:get_rollout_top_p_logprob_kwargs")
    def top_p(args, batch):
        return {"top_p_token_ids": None, "top_p_token_offsets": None}

    module = ModuleType("slime.backends.megatron_utils.loss")
    module.get_log_probs_and_entropy, module.get_rollout_top_p_logprob_kwargs = get_log_probs_and_entropy, top_p
    for name in ("slime", "slime.backends", "slime.backends.megatron_utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def rows(x):
        return [row[:n] for row, n in zip(x.detach(), lengths, strict=True)]

    given = {
        "unconcat_tokens": [], "total_lengths": [n + 2 for n in lengths], "response_lengths": lengths,
        "advantages": rows(batch.advantages), "log_probs": rows(batch.old), "loss_masks": rows(batch.mask),
        "rollout_log_probs": rows(batch.old + 0.1),
    }  # fmt: skip
    return given, torch.cat(rows(batch.logp))[None, :, None].clone().requires_grad_(True)


def test_slimes_signature():
    assert SLIME.source.startswith("THUDM/slime at 624b824a")
    wanted = list(SLIME.signature(f"{SLIMES_LOSS}:policy_loss_function").parameters)
    assert list(inspect.signature(slime.step_loss).parameters) == wanted
    assert list(inspect.signature(slime.step_advantage).parameters) == ["args", "rollout_data"]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("options", [{}, {"use_rollout_logprobs": True}])
def test_slimes_loss(batch, slimes, per_token, options):
    """By the formula, a sample and a step at a time; slime's reducer is written out as its cp_utils.py has it."""
    given, logits = slimes
    masks, lengths, denoms = given["loss_masks"], given["response_lengths"], [9.0, 9.0, 5.0, 4.0]  # of rollouts

    def reducer(x):
        parts = zip(x.split(lengths), masks, denoms, strict=True)
        return sum((row * mask).sum() / (1.0 if per_token else denom) for row, mask, denom in parts)

    args = slimes_args(**options)
    loss, log = slime.step_loss(args, given, logits, reducer)
    loss.backward()
    again = logits.detach().clone().requires_grad_(True)
    new = again[0, :, 0]
    old = torch.cat(given["rollout_log_probs" if options else "log_probs"])
    ids = torch.cat([row[:n] for row, n in zip(batch.ids, lengths, strict=True)])
    sample = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    tokens = torch.zeros(len(new))
    for key in {(int(s), int(k)) for s, k in zip(sample, ids, strict=True) if k >= 0}:
        at = (sample == key[0]) & (ids == key[1])
        ratio = (new - old)[at].mean().exp()
        advantage = torch.cat(given["advantages"])[at][0]
        plain = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.3))
        capped = torch.minimum(plain, -advantage * 3.0) if advantage < 0 else plain
        tokens = torch.where(at, capped, tokens)
    want = reducer(tokens) - 0.01 * reducer(0.1 * new)
    want.backward()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.grad, again.grad, rtol=1e-5, atol=1e-6)
    assert logits.grad.abs().sum() > 0 and log.keys() >= {"loss", "pg_loss", "pg_clipfrac", "ppo_kl", "entropy_loss"}
    torch.testing.assert_close(log["ppo_kl"], reducer((old - new).detach()))
    assert all(not value.requires_grad for value in log.values())


def test_what_slimes_loss_refuses(slimes):
    given, logits = slimes
    for name in ("use_kl_loss", "use_tis", "use_opsm", "get_mismatch_metrics", "normalize_advantages"):
        with pytest.raises(ValueError, match=f"{name}: expected it off .*, got True"):
            slime.step_loss(slimes_args(**{name: True}), given, logits, torch.sum)
    given["response_lengths"] = given["response_lengths"][:]
    sys.modules["slime.backends.megatron_utils.loss"].get_log_probs_and_entropy = lambda logits, **_: (
        None, {"log_probs": [logits[0, :3, 0]] * 4, "entropy": [logits[0, :3, 0]] * 4},
    )  # fmt: skip
    with pytest.raises(ValueError, match="context_parallel_size: expected 1"):
        slime.step_loss(slimes_args(), given, logits, torch.sum)
