# SPDX-License-Identifier: Apache-2.0
"""SSPOTrainer on rollouts whose probabilities are not the loss's: log-probs carried along, weights, kept tokens.

Mutations, each caught by the test named:
  the loss at temperature 1 beside sampling at another   test_our_engines_need_no_correction
  kept tokens not handed to the layout                   test_our_engines_need_no_correction
  log-probs in the order of the rollouts before sorting  test_weights_reach_the_loss
  weights left out of the loss                           test_weights_reach_the_loss
  a sum of maxima; a second wait                         test_sums_of_means_and_maxima
"""

import logging
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from helpers.rl import ROWS, make_tokenizer, make_trainer
from helpers.sspo import Fixed, said

from sspo_ext.losses import rollout_correction, step_logps
from sspo_ext.train import sspo_inputs
from sspo_ext.train.means import Sums
from sspo_ext.train.rollout import CompactEngine
from sspo_ext.train.sampling import Completions

RATIO = "sampling/importance_sampling_ratio"


class Altered:
    """The compact engine, whose answers are altered."""

    def __init__(self, alter):
        self.engine, self.alter, self.asked = CompactEngine(0), alter, []

    def complete(self, model, prompts, sampling, seeds):
        self.asked.append((sampling.logps, sampling.kept))
        return self.alter(self.engine.complete(model, prompts, sampling, seeds))


def difference(place):
    """How much less likely the engine says that a token was than it is to the trainer: -0.3, 0, 0.3, 0.6, -0.3, ..."""
    return 0.3 * (place % 4 - 1)


def less_likely(made):
    """The same tokens, with other log-probs."""
    return Completions(
        made.token_ids, [[x - difference(i) for i, x in enumerate(row)] for row in made.logps], made.kept
    )


def trained(folder, **options):
    options = {"trainer_class": Fixed, "max_steps": 1, "learning_rate": 0.0, "rows": ROWS[:2], **options}
    trainer = make_trainer(folder, **options)
    trainer.train()
    (log,) = [line for line in trainer.state.log_history if "loss" in line]
    return trainer, log


SAMPLINGS = {
    "whole": {},
    "temperature": {"temperature": 0.7},
    "top_p": {"top_p": 0.8, "temperature": 1.3},
    "top_k": {"top_k": 5},
}


@pytest.mark.parametrize("route", ["linear", "logits"])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_our_engines_need_no_correction(tmp_path, name, route):
    """The loss's log-probs are those of the sampling: at its temperature, over the kept tokens."""
    options = {"route": route, "backend": "auto", "vllm_importance_sampling_correction": True, **SAMPLINGS[name]}
    for engine in ("generate", "compact"):
        trainer, log = trained(tmp_path / engine, rollout_engine=engine, **options)
        assert log["sampling/ratio/max"] == pytest.approx(1.0, abs=1e-4)
        assert log["sampling/sampling_logp_difference/max"] < 1e-4 and log[f"{RATIO}/clipped"] == 0
        (batch,) = trainer._buffer[0]
        assert (batch["layout"].kept is not None) == (name.startswith("top"))
        assert (batch["importance_weights"] - 1).abs().max() < 1e-3


def test_kept_tokens_alone_make_the_ratio_one(tmp_path):
    """An engine that does not say what it kept: the mean ratio is the mass that was kept, and the trainer says so."""
    sspo_inputs._say_once.cache_clear()
    logging.getLogger("sspo_ext").addHandler(handler := Records())
    try:
        forgets = Altered(lambda made: Completions(made.token_ids, made.logps))
        _, log = trained(tmp_path, engine=forgets, top_p=0.6, backend="auto", max_completion_length=20)
    finally:
        logging.getLogger("sspo_ext").removeHandler(handler)
    assert 0.5 < log["sampling/ratio/mean"] < 0.95
    assert log["sampling/ratio/max"] < 1 + 1e-4
    assert len(handler.found) == 1 and "which tokens top_p and top_k kept" in handler.found[0]


class Records(logging.Handler):
    def __init__(self):
        super().__init__()
        self.found = []

    def emit(self, record):
        self.found.append(record.getMessage())


@pytest.mark.parametrize("mode", ["token_truncate", "step_mask", "sequence_truncate"])
@pytest.mark.parametrize("route", ["linear", "logits"])
def test_weights_reach_the_loss(tmp_path, mode, route):
    """On without a word for an engine of one's own that has log-probs; the loss is that of weighted advantages."""
    options = {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 1.7, "route": route}
    engine = Altered(less_likely)
    trainer, log = trained(tmp_path, engine=engine, **options)
    assert engine.asked == [(True, False)]
    (batch,) = trainer._buffer[0]
    layout = batch["layout"]
    old = trainer.logps_without_grad(trainer.model, batch).tokens
    first = layout.sequence_offsets[:-1].repeat_interleave(layout.sequence_offsets.diff())
    want = rollout_correction(
        old, old - difference(torch.arange(layout.num_rows) - first), layout, mode=mode, clip_max=1.7
    )
    assert torch.allclose(batch["importance_weights"], want.weights, rtol=1e-3)
    assert (want.weights != 1).any() and want.weights.any()
    out, _ = trainer.policy_loss(trainer.model, batch, 10.0)
    weighted = batch["advantages"][layout.step_of_row] * want.weights
    assert out.loss.item() == pytest.approx(-(weighted * old).sum().item() / 10, rel=1e-3, abs=1e-5)
    assert log["sampling/ratio/mean"] > 1 and log["sampling/kl_k1"] < 0 < log["sampling/kl_k3"]
    assert log["sampling/ratio/max"] == pytest.approx(torch.tensor(0.6).exp().item(), rel=1e-3)
    assert log[f"{RATIO}/max"] <= 1.7 + 1e-6 and log[f"{RATIO}/clipped"] > 0


def test_who_is_corrected(tmp_path):
    """Our engines are not asked and log nothing; an engine without log-probs goes without, unless it must."""
    _, log = trained(tmp_path / "own")
    assert not [name for name in log if name.startswith("sampling/")]
    engine = Altered(lambda made: made)
    trained(tmp_path / "off", engine=engine, vllm_importance_sampling_correction=False)
    assert engine.asked == [(False, False)]
    sspo_inputs._say_once.cache_clear()
    trainer = said(tmp_path / "lists")
    trainer.train()
    assert "importance_weights" not in trainer._buffer[0][0]
    with pytest.raises(ValueError, match="vllm_importance_sampling_correction: expected an engine that returns"):
        said(tmp_path / "must", vllm_importance_sampling_correction=True).train()
    with pytest.raises(ValueError, match="engine: expected logps of every token"):
        trained(tmp_path / "short", engine=Altered(lambda made: Completions(made.token_ids, made.logps[:-1])))
    trained(tmp_path / "eval", engine=engine, eval_dataset=ROWS[:2], max_steps=1)[0].evaluate()
    assert engine.asked[-1] == (False, False)


def test_shared_prefixes_keep_their_tokens(tmp_path):
    """A group as a tree: the update of kept tokens and weights is that of separate rows."""
    found = {}
    for sharing in (True, False):
        options = {"prefix_sharing": sharing, "top_p": 0.7, "engine": Altered(less_likely), "learning_rate": 0.05}
        trainer, _ = trained(tmp_path / str(sharing), backend="auto", **options)
        found[sharing] = torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()])
        assert ("tree" in trainer._buffer[0][0]) == sharing
        assert trainer._buffer[0][0]["layout"].kept is not None
    assert (found[True] - found[False]).abs().max() < 1e-5


def test_sums_of_means_and_maxima(monkeypatch):
    """Maxima are maxima over batches and processes, means are over tokens, and the host waits once."""
    sums, waits = Sums(), []
    for value, rows in ((2.0, 3), (5.0, 1), (4.0, 2)):
        metrics = {"a/mean": torch.tensor(value), "a/max": torch.tensor(value)}
        sums.add_correction(metrics, SimpleNamespace(num_rows=rows))
    sums.add("b", 6.0, 4)
    other = torch.tensor([[7.0]], dtype=torch.float64)
    accelerator = SimpleNamespace(reduce=lambda x, how: x, gather=lambda x: torch.cat([x, other]))
    real = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: waits.append(1) or real(self))
    found = sums.pop(accelerator, torch.device("cpu"))
    assert found == {"a/mean": pytest.approx((6 + 5 + 8) / 6), "b": 1.5, "a/max": 7.0}
    assert len(waits) == 1
    assert sums.pop(accelerator, torch.device("cpu")) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "geometric"}, "vllm_importance_sampling_mode: expected one of"),
        ({"clip_max": 0.5, "clip_min": 0.6}, "vllm_importance_sampling_clip_min: expected less than"),
        ({"mode": "step_truncate", "clip_max": None}, "vllm_importance_sampling_clip_max: expected a bound"),
        ({"mode": "token_mask", "length_normalize": True}, "vllm_importance_sampling_length_normalize: expected False"),
    ],
)
def test_messages(tmp_path, options, message):
    from helpers.rl import config

    with pytest.raises(ValueError, match=message):
        config(tmp_path, **{f"vllm_importance_sampling_{name}": value for name, value in options.items()})


def test_first_tokens_without_a_prompt():
    """Nothing predicts the first token of a sequence: its log-prob and its set are left out with it."""
    from sspo_ext.train.experience import Rollout, policy_batch

    tokenizer = make_tokenizer()
    rollouts = [
        Rollout({}, prompt, [7, 8, 1], "", True, [[7, 8, 1]], advantages=[1.0], sampling_logps=[-1.0, -2.0, -3.0],
                kept=[[7], [8, 9], [1]])
        for prompt in ([], [5])
    ]  # fmt: skip
    batch = policy_batch(rollouts, tokenizer.pad_token_id)
    assert batch["sampling_logps"].tolist() == [-2.0, -3.0, -1.0, -2.0, -3.0]
    assert batch["layout"].kept.token_ids.tolist() == [8, 9, 1, 7, 8, 9, 1]
    assert step_logps(torch.zeros(2, 4, 30), batch["layout"]).tokens.exp().tolist() == pytest.approx(
        [0.5, 1, 1, 0.5, 1]
    )
