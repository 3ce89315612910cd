# SPDX-License-Identifier: Apache-2.0
"""SSPOTrainer: the update by hand, resume, one process against two, accumulation, adapters, and what is at the edges.

Mutations tried (what was broken -> which test went red):
    a cut-off completion keeps its reward               -> test_empty_and_cut_off_completions_train
    advantages handed out in another order              -> test_update_is_the_one_worked_out_by_hand
    loss times 2 (as for two processes)                 -> test_update_is_the_one_worked_out_by_hand
    the state after the last step is probed too         -> test_probed_values
    num_iterations left out of the order of prompts     -> test_prompts_in_order
    every epoch the same permutation                    -> test_prompts_in_order
"""

import json
import math
from unittest import mock

import pytest
import torch

pytest.importorskip("transformers")

from helpers.launch import torchrun
from helpers.ranks import sspo_two_ranks
from helpers.rl import ROWS, config, make_model, make_tokenizer, make_trainer, parameters
from helpers.sspo import REWARDS, TEXTS, Fixed, said

from sspo_ext.train.experience import PromptSampler, Rollout, policy_batch, split_steps
from sspo_ext.train.sspo_trainer import SSPOTrainer

# ---- the update


def test_update_is_the_one_worked_out_by_hand(tmp_path):
    gamma, lam, lr = 0.9, 0.5, 0.1
    trainer = said(tmp_path, gamma=gamma, lam=lam, learning_rate=lr)
    trainer.train()

    # GAE over steps, with V_k = 0.1 * (k + 1), backwards from the outcome
    steps = []
    for count, outcome in zip((2, 1, 3, 1), REWARDS, strict=True):
        after, swept = 0.0, []
        for k in reversed(range(count)):
            gain = outcome if k == count - 1 else gamma * 0.1 * (k + 2)
            after = gain - 0.1 * (k + 1) + gamma * lam * after
            swept.append(after)
        steps.append(swept[::-1])
    flat = torch.tensor([a for row in steps for a in row])
    # RLOO: the reward less the mean of the three others; each signal over its standard deviation
    rloo = torch.tensor([r - (sum(REWARDS) - r) / 3 for r in REWARDS])
    advantages = [[a / flat.std() + o / rloo.std() for a in row] for row, o in zip(steps, rloo, strict=True)]

    tokenizer, model = make_tokenizer(), make_model()
    prompt, loss, tokens = tokenizer(ROWS[0]["prompt"]).input_ids, 0.0, 0
    for text, per_step in zip(TEXTS, advantages, strict=True):
        step = 0
        ids = tokenizer(text).input_ids
        logps = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        for t, token in enumerate(ids):
            loss = loss - per_step[step] * logps[len(prompt) + t - 1, token]
            tokens += 1
            if tokenizer.decode([token]) == "\n":
                step += 1
    (loss / tokens).backward()
    expected = torch.cat([(p - lr * p.grad).detach().reshape(-1) for p in model.parameters()])
    assert (expected - parameters(make_model())).abs().max() > 1e-3  # there was something to learn
    torch.testing.assert_close(parameters(trainer.model), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("aggregation", ["token", "step", "sequence", "sum"])
def test_accumulated_update_is_the_whole_one(tmp_path, aggregation):
    whole = said(tmp_path, aggregation=aggregation, entropy_coef=0.01)
    parts = said(
        tmp_path, aggregation=aggregation, entropy_coef=0.01, per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )  # fmt: skip
    for trainer in (whole, parts):
        trainer.train()
    torch.testing.assert_close(parameters(whole.model), parameters(parts.model), rtol=0, atol=2e-6)
    loss = [t.state.log_history[0]["loss"] for t in (whole, parts)]
    assert loss[0] == pytest.approx(loss[1], rel=1e-4)


def test_routes_agree(tmp_path):
    found = []
    for route in ("linear", "logits"):
        trainer = make_trainer(tmp_path, route=route, max_steps=2)
        trainer.train()
        found.append(parameters(trainer.model))
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_outcome_alone_needs_no_answer_and_no_probe(tmp_path):
    trainer = said(tmp_path, rows=[{"prompt": "1+1=\n"}], combine="outcome", trainer_class=SSPOTrainer)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert "values/first" not in entry and "time/probe" not in entry and entry["accuracy"] == 0.5


def test_several_iterations_use_the_same_rollouts(tmp_path):
    calls = []

    class Counted(Fixed):
        def on_rollouts(self, rollouts):
            calls.append(self.state.global_step)

    trainer = said(tmp_path, trainer_class=Counted, num_iterations=3, max_steps=6, loss_type="ppo", epsilon=0.2)
    trainer.train()
    assert calls == [0, 3]
    ratios = [e["ratio/mean"] for e in trainer.state.log_history if "ratio/mean" in e]
    assert ratios[0] == pytest.approx(1, abs=1e-5) and abs(ratios[1] - 1) > 1e-4


def test_reference_is_the_model_as_given(tmp_path):
    kl = {}
    for name, extra in (("full", {}), ("lora", {"peft_config": _lora()})):
        trainer = make_trainer(tmp_path / name, beta=0.5, max_steps=3, **extra)
        trainer.train()
        kl[name] = [e["kl"] for e in trainer.state.log_history if "kl" in e]
        assert kl[name][0] == pytest.approx(0, abs=1e-6) and kl[name][2] > 1e-6, kl


def _lora():
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")


def test_lora_trains_the_adapter_alone(tmp_path):
    model = make_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = make_trainer(tmp_path, model=model, peft_config=_lora())
    trainer.train()
    moved = 0
    for name, p in trainer.model.named_parameters():
        if "lora_" in name:
            moved += (p.grad is not None) or bool((p != 0).any())
        else:
            short = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(p, before[short]), name
    assert moved


# ---- resume


class _StopAt:
    def __new__(cls, step):
        from transformers import TrainerCallback

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = state.global_step == step

        return Stop()


@pytest.mark.parametrize("iterations", [1, 2])
def test_resumed_equals_uninterrupted_bitwise(tmp_path, iterations):
    """With dropout, momentum, a schedule, an epoch's end in between and sampled rollouts."""
    options = dict(
        rows=ROWS[:5], max_steps=8, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        lr_scheduler_type="linear", optim="adamw_torch", learning_rate=1e-3, save_strategy="steps", save_steps=4,
        num_iterations=iterations, loss_type="ppo" if iterations > 1 else "reinforce", beta=0.1,
    )  # fmt: skip
    whole = make_trainer(tmp_path / "whole", model=make_model(dropout=0.1), **options)
    whole.train()
    first = make_trainer(tmp_path / "parts", model=make_model(dropout=0.1), **options)
    first.add_callback(_StopAt(4))
    first.train()
    assert not torch.equal(parameters(first.model), parameters(whole.model))
    second = make_trainer(tmp_path / "parts", model=make_model(dropout=0.1), **options)
    second.train(resume_from_checkpoint=True)
    assert torch.equal(parameters(second.model), parameters(whole.model))

    def logs(trainer):
        keep = [e for e in trainer.state.log_history if "loss" in e]
        return [{k: v for k, v in e.items() if not k.startswith("time/")} for e in keep]

    assert logs(second) == logs(whole) and len(logs(whole)) == 8


def test_save_steps_must_fall_between_rollouts(tmp_path):
    with pytest.raises(ValueError, match="save_steps: expected a multiple of num_iterations=2"):
        config(tmp_path, num_iterations=2, loss_type="ppo", save_strategy="steps", save_steps=3)


# ---- processes


@pytest.mark.slow
def test_two_processes_make_the_same_updates_as_one(tmp_path):
    (tmp_path / "two").mkdir()
    torchrun("helpers.ranks.sspo_two_ranks", tmp_path / "two")
    one, two = sspo_two_ranks.main(tmp_path / "one"), torch.load(tmp_path / "two" / "found.pt", weights_only=False)
    torch.testing.assert_close(two["parameters"], one["parameters"], rtol=0, atol=1e-5)
    assert (one["parameters"] - parameters(make_model())).abs().max() > 1e-2
    assert len(one["logs"]) == len(two["logs"]) == 5
    for a, b in zip(one["logs"], two["logs"], strict=True):
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), name


# ---- the edges


def test_steps_of_all_kinds(tmp_path):
    tokenizer = make_tokenizer()
    trainer = said(tmp_path)
    texts = ["12", "1\n2<eos>", "", "<eos>", "\n\n1\n\n2\n", "检查\n🙂🙂\n3<eos>"]
    ids = [tokenizer(text).input_ids for text in texts]
    steps = split_steps(ids, trainer.delimiters)
    assert [["".join(tokenizer.convert_ids_to_tokens(s)) for s in row] for row in steps] == [
        ["12"], ["1\n", "2<eos>"], [], ["<eos>"], ["\n\n1\n\n", "2\n"], ["检查\n", "🙂🙂\n", "3<eos>"],
    ]  # fmt: skip
    assert split_steps([[], []], trainer.delimiters) == [[], []]


def test_empty_and_cut_off_completions_train(tmp_path):
    trainer = said(tmp_path, texts=["", "12", "<eos>", "2<eos>"])
    trainer.train()
    entry = trainer.state.log_history[0]
    assert math.isfinite(entry["loss"]) and entry["accuracy"] == 0.25
    assert entry["completions/clipped_ratio"] == 0.5  # the one without an end, and the empty one
    assert not torch.equal(parameters(trainer.model), parameters(make_model()))


def test_cut_off_completion_earns_nothing(tmp_path):
    trainer = said(tmp_path)
    rollouts = trainer.roll_out(ROWS[:1] * 2, [(0,), (3,)])
    assert [r.ended for r in rollouts] == [True, False] and [r.reward for r in rollouts] == [1.0, 0.0]
    trainer = said(tmp_path, texts=["2"])  # right, but for its end
    assert trainer.roll_out(ROWS[:1], [(0,)])[0].reward == 0.0


def test_nothing_to_learn_leaves_the_model(tmp_path):
    """All alike, and values of nought: advantages are 0, the model stays, nothing is NaN."""

    class Nothing(SSPOTrainer):
        def step_values(self, rollouts):
            return [[0.0] * (len(r.steps) + 1) for r in rollouts]

    trainer = said(tmp_path, texts=["1<eos>"], trainer_class=Nothing)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == 0
    assert torch.equal(parameters(trainer.model), parameters(make_model()))


def test_only_empty_completions(tmp_path):
    trainer = said(tmp_path, texts=[""])
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == 0
    assert torch.equal(parameters(trainer.model), parameters(make_model()))


def test_probed_values(tmp_path):
    """V_k is the probability of the answer, and of the end after it where that is asked for; V_K is 0."""
    trainer = said(tmp_path, trainer_class=SSPOTrainer)
    rollouts = trainer.roll_out(ROWS[:1], [(0,)])
    (values,) = trainer.step_values(rollouts)
    assert len(values) == 3 and values[-1] == 0.0
    model, tokenizer = make_model().eval(), make_tokenizer()
    state = ROWS[0]["prompt"] + "1+1\n"
    ids = tokenizer(state + "# 2").input_ids
    logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert values[1] == pytest.approx((logps[-3, ids[-2]] + logps[-2, ids[-1]]).exp().item(), rel=1e-4)
    trainer.args.probe_end = "<eos>"
    ended = trainer.step_values(rollouts)[0][1]
    assert ended == pytest.approx(values[1] * logps[-1, 1].exp().item(), rel=1e-4)


def test_graded_probe_asks_the_grader(tmp_path):
    seen = []

    def grader(prompt, completion, answer):
        seen.append((prompt, completion, answer))
        return 1.0

    trainer = said(
        tmp_path, trainer_class=SSPOTrainer, reward_func=grader,
        probe_options={"mode": "graded", "num_samples": 2, "max_answer_tokens": 2},
    )  # fmt: skip
    rollouts = trainer.roll_out(ROWS[:1], [(0,)])
    seen.clear()
    assert trainer.step_values(rollouts) == [[1.0, 1.0, 0.0]]
    assert all(p == ROWS[0]["prompt"] and a == "2" for p, _, a in seen)
    answers = {c for _, c, _ in seen if not c.startswith("#")}  # each by itself, and after the probe's text
    assert answers and {f"# {c}" for c in answers} <= {c for _, c, _ in seen}


def test_policy_batch():
    rollout = Rollout(None, [5, 6], [7, 8, 9], "", True, [[7], [8, 9]], advantages=[0.5, -1.0])
    batch = policy_batch([rollout, Rollout(None, [4], [], "", False)], 0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [4, 0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 0, 0, 0, 0]]
    assert batch["layout"].labels.tolist() == [7, 8, 9] and batch["layout"].num_steps == 2
    assert batch["advantages"].tolist() == [0.5, -1.0]


def test_advantages_stay_on_the_host(tmp_path):
    """There they tell the loss, without a wait, which rows need no gradient."""
    trainer = make_trainer(tmp_path)
    batch = policy_batch([Rollout(None, [5], [7, 8], "", True, [[7], [8]], advantages=[0.5, 0.0])], 0)
    with mock.patch.object(type(trainer.args), "device", torch.device("meta")):
        moved = trainer._prepare_inputs(batch)
    assert moved["input_ids"].device.type == moved["layout"].device.type == "meta"
    assert moved["advantages"].tolist() == [0.5, 0.0]


def test_prompts_in_order():
    done = 0
    sampler = PromptSampler(5, 2, 3, 2, seed=1, updates_done=lambda: done)
    epochs = []
    for done in (0, 4, 8):  # noqa: B007
        rows = list(sampler)
        assert len(rows) == len(sampler) == 24
        assert rows[:6] == rows[6:12] and rows[0] == rows[1] == rows[2] != rows[3]
        epochs.append(rows)
    assert epochs[0] != epochs[1] != epochs[2]
    with pytest.raises(ValueError, match="at least the 9 prompts of one update, got 5"):
        PromptSampler(5, 9, 1, 1, 0, lambda: 0)


def test_evaluation_is_greedy_and_repeatable(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=ROWS)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first == second and set(first) >= {"eval_accuracy", "eval_reward", "eval_completions/mean_length"}
    assert 0 < first["eval_completions/mean_length"] <= 12


def test_logs(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, entropy_coef=0.01, beta=0.1)
    trainer.train()
    entry = trainer.state.log_history[1]
    for name in ("loss", "accuracy", "reward", "reward_std", "steps/mean", "completions/mean_length", "values/first",
                 "values/last", "advantages/std", "kl", "entropy", "time/rollout", "time/probe", "time/grade",
                 "time/update"):  # fmt: skip
        assert math.isfinite(entry[name]), name
    json.dumps(trainer.state.log_history)


# ---- what is refused


@pytest.mark.parametrize(
    "options,message",
    [
        ({"per_device_train_batch_size": 3}, "to be a multiple of num_generations=4"),
        ({"loss_type": "dpo"}, "loss_type: 'dpo' is a preference loss: call step_pref_loss, or sspo-ext train"),
        ({"epsilon": 0.2}, "epsilon: neither a common option nor one of loss_type 'reinforce'"),
        ({"gamma": 1.5}, "gamma: expected a number in \\[0, 1\\], got 1.5"),
        ({"baseline": "rlo"}, "baseline: expected one of"),
        ({"combine": "sum"}, "combine: expected one of"),
        ({"num_iterations": 2}, "num_iterations: expected 1 with loss_type 'reinforce'"),
        ({"rollout_engine": "sglang"}, "rollout_engine: expected one of"),
        ({"split_by": "newlines"}, "'newlines' is none of"),
        ({"rows": [{"prompt": "1"}]}, "train_dataset: 1 of 1 rows cannot be used:\n  row 0: expected 'answer'"),
        ({"rows": iter(ROWS)}, "train_dataset: expected rows with a length"),
        ({"rows": ROWS[:1], "per_device_train_batch_size": 8}, "at least the 2 prompts of one update, got 1"),
    ],
)
def test_mistakes_are_named(tmp_path, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make_trainer(tmp_path, **options).train()


def test_reward_must_be_a_number(tmp_path):
    for bad, error in ((lambda *a: "good", TypeError), (lambda *a: math.nan, ValueError)):
        with pytest.raises(error, match="grader: expected a"):
            said(tmp_path, reward_func=bad).train()
