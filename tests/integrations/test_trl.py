# SPDX-License-Identifier: Apache-2.0
"""The classes of sspo_ext.integrations.trl, run on the CPU through TRL's own training.

Mutations, each caught by the test named:
  rewards of another process's or order's rows; V_K of the model; gamma left out      test_grpo_advantages_by_hand
  outcome advantages alone; steps of the prompt                                       test_one_update_is_that_of_sspo
  no reference; the adapter's own as reference; another beta; labels unshifted        test_dpo_with_one_step
  the reference's columns one off; those of a cache of sequences                      test_dpo_references_agree
"""

from copy import deepcopy

import pytest
import torch
from helpers.rl import ROWS, make_model, make_tokenizer, parameters
from helpers.sspo import REWARDS, TEXTS, right

pytest.importorskip("trl", reason="trl is not installed")
pytestmark = pytest.mark.filterwarnings("default::FutureWarning")  # TRL's own config sets the old name

import trl  # noqa: E402
from datasets import Dataset  # noqa: E402

from sspo_ext.integrations.trl import StepDPOTrainer, StepGRPOTrainer  # noqa: E402
from sspo_ext.signals import combine_advantages, outcome_advantages, step_gae  # noqa: E402

PLAIN = dict(
    learning_rate=0.05, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant", save_strategy="no",
    report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, logging_steps=1,
)  # fmt: skip


def graded(prompts, completions, answer, **columns):
    return [right(p, c, a) for p, c, a in zip(prompts, completions, answer, strict=True)]


def grpo(folder, rows=ROWS[:1], said=None, trainer_class=StepGRPOTrainer, model=None, **options):
    """A trainer, whose completions are known if `said` has texts."""
    tokenizer = make_tokenizer()

    class Said(trainer_class):
        seen = []

        def _generate_single_turn(self, prompt_ids, *args):
            if said is None:
                return super()._generate_single_turn(prompt_ids, *args)
            ids = [tokenizer(text).input_ids for text in said]
            return [ids[i % len(ids)] for i in range(len(prompt_ids))], None

        def _generate_and_score_completions(self, inputs):
            found = super()._generate_and_score_completions(inputs)
            self.seen.append((found, self.__dict__.get("asked")))
            return found

        def step_values(self, batch, rows):
            self.asked = super().step_values(batch, rows)
            return self.asked

    settings = dict(
        output_dir=str(folder), per_device_train_batch_size=4, num_generations=4, max_completion_length=12, max_steps=1,
        beta=0.0, temperature=1.0, loss_type="grpo", **PLAIN,
    )  # fmt: skip
    own = {key: options.pop(key) for key in ("probe", "gamma", "lam", "combine", "step_scale") if key in options}
    args = trl.GRPOConfig(**{**settings, **options})
    return Said(
        model or make_model(), graded, args, Dataset.from_list(rows), processing_class=tokenizer,
        **{"probe": "#", **own},
    )  # fmt: skip


def test_three_updates(tmp_path):
    """Sampled by TRL, probed, trained: finite losses, moved weights, values in the log."""
    start = make_model()
    trainer = grpo(tmp_path, ROWS, model=deepcopy(start), max_steps=3, gamma=0.95, lam=0.9)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3 and all(torch.isfinite(torch.tensor(entry["loss"])) for entry in logs)
    assert all(0 <= entry["values/first"] <= 1 and entry["advantages/steps"] > 0 for entry in logs)
    assert (parameters(trainer.model) - parameters(start)).abs().max() > 1e-3
    assert all(found["advantages"].shape == found["completion_ids"].shape for found, _ in trainer.seen)


def test_grpo_advantages_by_hand(tmp_path):
    """Token by token the list form's advantages, exactly, from the values that were asked for."""
    trainer = grpo(tmp_path, said=TEXTS, gamma=0.9, lam=0.8, step_scale=0.5, combine="add")
    trainer.train()
    (found, values), *_ = trainer.seen
    rewards = torch.tensor(REWARDS)
    steps = step_gae(values, rewards, gamma=0.9, lam=0.8)
    outcome = outcome_advantages(rewards, "grpo", groups=torch.zeros(4, dtype=torch.int64))
    want = combine_advantages(steps, outcome, values.step_sequence, step_scale=0.5)
    assert values.steps_per_sequence.tolist() == [2, 1, 3, 1]
    rows = [[0, 1], [2], [3, 4, 5], [6]]
    lengths = [4, 3, 2, 2, 2, 2, 2]  # 1+1\n | #2<eos>; 3<eos>; 0\n | 1\n | 2<eos>; ab
    for b, numbers in enumerate(rows):
        tokens = torch.cat([want[s].expand(lengths[s]) for s in numbers])
        got = found["advantages"][b]
        torch.testing.assert_close(got[: len(tokens)], tokens, rtol=1e-6, atol=1e-7)
        assert got[len(tokens) :].abs().sum() == 0


@pytest.mark.parametrize(("loss_type", "aggregation"), [("grpo", "sequence"), ("dapo", "token")])
def test_one_update_is_that_of_sspo(tmp_path, loss_type, aggregation):
    """The same rollouts, one SGD step: the weights of SSPOTrainer."""
    from helpers.sspo import said

    from sspo_ext.train.sspo_trainer import SSPOTrainer

    start = make_model()
    ours = said(
        tmp_path / "ours", trainer_class=SSPOTrainer, model=deepcopy(start), loss_type="ppo", aggregation=aggregation,
        baseline="grpo", gamma=0.9, lam=0.8, combine="add", scale_advantages=False, step_scale=0.5,
    )  # fmt: skip
    ours.train()
    theirs = grpo(
        tmp_path / "trl", said=TEXTS, model=deepcopy(start), gamma=0.9, lam=0.8, step_scale=0.5, loss_type=loss_type
    )
    theirs.train()
    moved = (parameters(ours.model) - parameters(start)).abs().max()
    apart = (parameters(theirs.model) - parameters(ours.model)).abs().max()
    print(f"{loss_type}: moved {moved:.3g}, apart {apart:.3g}")
    assert moved > 1e-2 and apart < 2e-5 * moved
    without = grpo(tmp_path / "without", said=TEXTS, model=deepcopy(start), step_scale=0.0, loss_type=loss_type)
    without.train()
    assert (parameters(without.model) - parameters(ours.model)).abs().max() > 0.01 * moved


PAIRS = [
    {"prompt": "1+1=\n", "chosen": "1 and 1\nis 2\n", "rejected": "1 or 1\nis 3\n"},
    {"prompt": "2+3=\n", "chosen": "2 and 3\nis 5\n", "rejected": "it is 4\n"},
    {"prompt": "4+1=\n", "chosen": "5\n", "rejected": "4 and\n1 and\nis 6\n"},
    {"prompt": "0+1=\n", "chosen": "0\nand\n1\n", "rejected": "1\n"},
]


def byte_model(tokenizer, seed=0):
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, eos_token_id=0, pad_token_id=0, bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def dpo(folder, trainer_class=StepDPOTrainer, reference="model", by="newline", **options):
    """The trainer after three updates."""
    from helpers.tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer()
    start, other, data = byte_model(tokenizer), byte_model(tokenizer), Dataset.from_list(PAIRS)
    more = {"ref_model": other}
    if reference == "adapter":
        from peft import LoraConfig

        more = {"peft_config": LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)}
    settings = dict(output_dir=str(folder), per_device_train_batch_size=2, max_steps=3, beta=0.5, **PLAIN)
    args = trl.DPOConfig(**{**settings, "precompute_ref_log_probs": reference == "precomputed", **options})
    own = {"split_by": by} if trainer_class is StepDPOTrainer else {}
    trainer = trainer_class(
        start, args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer, **more, **own
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("reference", "loss_type"),
    [
        ("model", ["sigmoid"]),
        ("adapter", ["sigmoid"]),
        ("precomputed", ["sigmoid"]),
        ("model", ["ipo"]),
        ("model", ["sigmoid", "apo_zero"]),
    ],
)
def test_dpo_with_one_step(tmp_path, reference, loss_type):
    """One step a sequence: TRL's own updates, and its metrics."""
    options = {"reference": reference, "loss_type": loss_type, "learning_rate": 0.02}
    ours = dpo(tmp_path / "ours", by=r"(?!)", **options)
    theirs = dpo(tmp_path / "trl", trl.DPOTrainer, **options)
    moved = parameters(ours.model)
    torch.testing.assert_close(moved, parameters(theirs.model), rtol=0, atol=1e-6)
    logs = [[entry for entry in t.state.log_history if "loss" in entry] for t in (ours, theirs)]
    for key in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        if key == "loss" or key.startswith("logps") or len(loss_type) == 1 and loss_type != ["ipo"]:
            # the first update's rewards are rounding around 0
            assert [e[key] for e in logs[0]][1:] == pytest.approx([e[key] for e in logs[1]][1:], rel=1e-4, abs=1e-4), (
                key
            )
    assert "eval_rewards/margins" in ours.evaluate()


def test_dpo_references_agree(tmp_path):
    """By steps: a reference model and its log-probs computed before give the same updates; metrics of steps."""
    model, before = (dpo(tmp_path / name, reference=name) for name in ("model", "precomputed"))
    torch.testing.assert_close(parameters(model.model), parameters(before.model), rtol=0, atol=1e-6)
    columns = before.train_dataset[0]
    assert len(columns["ref_chosen_logps"]) == len(columns["ref_rejected_logps"]) == 3  # steps of the longest answer
    logs = [entry for entry in model.state.log_history if "loss" in entry]
    # before the first update every step's reference is the policy itself: log 2
    assert logs[0]["loss"] == pytest.approx(0.6931472, abs=1e-5) and logs[1]["loss"] != logs[0]["loss"]
    assert all(entry["pairs/count"] >= 2 and entry["steps/count"] > 4 for entry in logs)
    whole = dpo(tmp_path / "whole", by=r"(?!)")
    assert (parameters(whole.model) - parameters(model.model)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ld_alpha": 0.5}, "ld_alpha: expected None beside steps"),
        ({"use_weighting": True}, "use_weighting: expected False"),
        ({"f_divergence_type": "js_divergence"}, "f_divergence_type: expected 'reverse_kl'"),
        ({"loss_type": ["aot"]}, "loss_type: expected a pair loss of sspo_ext, got 'aot'"),
    ],
)
def test_dpo_refuses_what_it_does_not_do(tmp_path, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        dpo(tmp_path, **options)


@pytest.mark.parametrize("title", ["step_grpo.py", "step_dpo.py"])
def test_the_page(tmp_path, title):
    """The code of docs/integrations.md, with the reader's names."""
    from helpers.pages import blocks
    from helpers.paths import DOCS
    from helpers.tokenizer import byte_tokenizer

    (code,) = [block.text for block in blocks(DOCS / "integrations.md") if block.title == title]
    tokenizer = byte_tokenizer()
    common = dict(output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=1, **PLAIN)
    if title == "step_grpo.py":
        args = trl.GRPOConfig(num_generations=2, max_completion_length=8, **common)
        data = Dataset.from_list([{"prompt": "1+1=", "answer": "2"}] * 2)
    else:
        args, data = trl.DPOConfig(**common), Dataset.from_list(PAIRS)
    scope = {"model": byte_model(tokenizer), "reward": graded, "args": args, "rows": data, "tokenizer": tokenizer}
    if title == "step_dpo.py":
        scope["model"].save_pretrained(tmp_path / "start")
        scope["model"] = str(tmp_path / "start")
    exec(code, scope)
    assert scope["trainer"].state.global_step == 1
