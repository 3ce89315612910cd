# SPDX-License-Identifier: Apache-2.0
"""Several reward functions in SSPOTrainer and `rl`, and completions that are cut off left out of the loss.

Mutations, each caught by the test named:
  values about the sum of rewards                                 test_values_are_about_the_first_function
  a masked completion counts in num_items                         test_completions_that_are_cut_off_are_left_out
  weights of functions are not used                               test_what_is_logged
  the worst reward of a function with a negative weight is 0      test_the_worst_rewards
"""

import math

import pytest
import torch

pytest.importorskip("transformers")

from helpers.rl import ROWS, Says, make_model, make_tokenizer, make_trainer, parameters, reward

from sspo_ext.data.rewards import RewardFunctions
from sspo_ext.train.experience import Summary, with_worst_rewards


def brief(prompts, completions, **columns):
    return [-float(len(text)) for text in completions]


def loud(prompts, completions, **columns):
    return [-1000.0 * len(text) for text in completions]


def sometimes(prompts, completions, **columns):
    return [None if "333" in text else (len(text) % 5) / 4 for text in completions]


SAID = ["1\n22<eos>", "333<eos>", "44\n5\n6<eos>", "5\n55555<eos>"]


def trained(folder, reward_func, **options):
    if "engine" not in options:
        options |= {"engine": Says(make_tokenizer(), SAID)}
    trainer = make_trainer(folder, reward_func=reward_func, **options)
    trainer.train()
    return trainer


def moved(trainer):
    return parameters(trainer.model) - parameters(make_model())


def test_one_function_alone_or_in_a_list(tmp_path):
    alone, listed = trained(tmp_path / "a", reward), trained(tmp_path / "b", [reward])
    assert moved(alone).abs().max() > 1e-4
    assert torch.equal(parameters(alone.model), parameters(listed.model))


def test_what_is_logged(tmp_path):
    trainer = trained(tmp_path, [reward, brief], reward_weights=[2.0, 0.5], max_steps=1)
    line = trainer.state.log_history[0]
    assert line["reward"] == pytest.approx(2 * line["rewards/reward/mean"] + 0.5 * line["rewards/brief/mean"])
    assert line["rewards/brief/mean"] < 0 and line["rewards/brief/std"] > 0
    found = trainer.evaluate(ROWS[:4])
    assert found["eval_reward"] == pytest.approx(
        2 * found["eval_rewards/reward/mean"] + 0.5 * found["eval_rewards/brief/mean"]
    )
    assert 0 <= found["eval_accuracy"] <= 1
    assert not any(name.startswith("rewards/") for name in trained(tmp_path, reward, max_steps=1).state.log_history[0])


def test_values_are_about_the_first_function(tmp_path):
    """Step advantages are those of the first function alone; the others, of any scale, change only the outcome's."""
    seen = {}
    for name, functions in (("one", [reward]), ("two", [reward, loud])):
        engine = Says(make_tokenizer(), SAID)
        trainer = make_trainer(tmp_path / name, reward_func=functions, combine="replace", max_steps=1, engine=engine)
        trainer.on_rollouts = lambda rollouts, name=name: seen.setdefault(name, [r.advantages for r in rollouts])
        trainer.train()
    assert seen["one"] == seen["two"] and any(map(any, seen["one"]))


def test_a_weight_of_the_one_function_leaves_values_alone(tmp_path):
    """Step advantages compare rewards with values; a weight is for the outcome's advantage."""
    seen = {}
    for name, options in (("plain", {}), ("weighed", {"reward_weights": [0.1]})):
        engine = Says(make_tokenizer(), SAID)
        trainer = make_trainer(tmp_path / name, combine="replace", max_steps=1, engine=engine, **options)
        trainer.on_rollouts = lambda rollouts, name=name: seen.setdefault(name, [r.advantages for r in rollouts])
        trainer.train()
    assert seen["plain"] == seen["weighed"] and any(map(any, seen["plain"]))


@pytest.mark.parametrize("how", ("sum_then_normalize", "normalize_then_sum"))
def test_a_loud_function_in_a_training(tmp_path, how):
    options = {"multi_objective_aggregation": how, "combine": "outcome", "max_steps": 1}
    quiet = trained(tmp_path / "a", [reward, brief], **options)
    noisy = trained(tmp_path / "b", [reward, loud], **options)
    gap = (moved(quiet) - moved(noisy)).abs().max() / moved(quiet).abs().max()
    assert gap < 1e-3 if how == "normalize_then_sum" else gap > 0.05


def test_functions_that_do_not_apply(tmp_path):
    trainer = trained(tmp_path / "a", [reward, sometimes], max_steps=1)
    assert parameters(trainer.model).isfinite().all()
    assert trainer.state.log_history[0]["rewards/sometimes/mean"] >= 0
    with pytest.raises(ValueError, match="expected a reward of sometimes, the first function, for every completion"):
        trained(tmp_path / "b", [sometimes, reward], min_signal=0.0)
    trained(tmp_path / "c", [sometimes, reward], combine="outcome", max_steps=1)  # nothing is probed
    with pytest.raises(ValueError, match="expected a function that applies, got None from all"):
        trained(tmp_path / "d", [lambda prompts, **more: [None] * len(prompts)] * 2, combine="outcome")


def test_functions_and_their_weights():
    functions = RewardFunctions([reward, brief, brief], [1, 2, -3])
    assert functions.names == ["reward", "brief", "brief_2"]
    assert functions.total([1.0, math.nan, 2.0]) == -5
    assert functions([{"prompt": "1", "answer": "1"}], ["abcd"]) == [[1.0, -4.0, -4.0]]
    for given, kind, message in (
        ([], ValueError, "reward_func: expected a function, or several, got none"),
        ([reward, 3], TypeError, "reward_func: expected a function, or a list of them, got 3"),
    ):
        with pytest.raises(kind, match=message):
            RewardFunctions(given)
    for weights in ([1.0], [1.0, math.inf]):
        with pytest.raises(ValueError, match="^reward_weights: expected "):
            RewardFunctions([reward, brief], weights)


def test_the_worst_rewards():
    functions = RewardFunctions([reward, brief, loud], [1.0, 1.0, -1.0])
    rows = [
        Summary(0, 0.0, 1, [], 3, True, [1.0, -2.0, 5.0]),
        Summary(1, 0.0, 1, [], 3, False, [0.0, 0.0, 0.0]),
        Summary(2, 0.0, 1, [], 3, True, [0.5, math.nan, 7.0]),
    ]
    found = with_worst_rewards(rows, functions)
    assert found[0] == rows[0] and found[2] is rows[2]
    assert found[1].rewards == [0.0, -2.0, 7.0] and found[1].reward == -9.0


# ---- completions that are cut off


def test_completions_that_are_cut_off_are_left_out(tmp_path):
    """The update is that of the others alone, with the advantages that they have beside the ones left out."""
    tokenizer = make_tokenizer()
    texts = ["1\n22<eos>", "333\n333333333", "44<eos>", "5\n5<eos>"]  # the second one has no end
    options = {"tokenizer": tokenizer, "engine": Says(tokenizer, texts), "max_steps": 1, "combine": "outcome"}
    options["prefix_sharing"] = False
    seen = {}

    def run(name, **more):
        trainer = make_trainer(tmp_path / name, **options, **more)
        trainer.on_rollouts = lambda rollouts: seen.setdefault(name, rollouts)
        micro = []
        step = trainer.training_step
        trainer.training_step = lambda model, inputs, *rest: (micro.append((inputs, rest)), step(model, inputs, *rest))[
            1
        ]
        trainer.train()
        return trainer, micro

    plain, _ = run("plain")
    masked, micro = run("masked", mask_truncated_completions=True)
    cut = [r.ended for r in seen["masked"]]
    assert sorted(cut) == [False, True, True, True]
    assert [r.advantages for r in seen["plain"]] == [r.advantages for r in seen["masked"]]
    ((batch, (items,)),) = micro
    tokens = sum(len(r.completion_ids) for r in seen["masked"] if r.ended)
    assert float(items) == tokens  # the loss divides by what is scored
    assert batch["input_ids"].shape == (4, 5 + 5)  # and the model reads nothing of what is not
    assert (moved(plain) - moved(masked)).abs().max() > 1e-4


@pytest.mark.parametrize("sharing", (True, False))
def test_all_completions_are_cut_off(tmp_path, sharing):
    tokenizer = make_tokenizer()
    options = {"engine": Says(tokenizer, ["1\n2222222222", "2\n3333333333"]), "max_steps": 1, "beta": 0.1}
    trainer = trained(
        tmp_path, lambda prompts, **more: [1.0] * len(prompts), tokenizer=tokenizer, prefix_sharing=sharing,
        mask_truncated_completions=True, per_device_train_batch_size=2, gradient_accumulation_steps=2, **options,
    )  # fmt: skip
    assert not moved(trainer).any()


def test_several_graders_of_the_command(tmp_path, capsys):
    import json

    from sspo_ext.cli.main import main

    make_model().save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = ["rl", "--model", str(tmp_path / "m"), "--data", str(tmp_path / "p.jsonl"), "--probe", "#"]
    command += ["--output-dir", str(tmp_path / "o"), "--batch-size", "4", "--num-generations", "4"]
    command += ["--max-completion-length", "8", "--max-steps", "1"]
    both = ["--grader", "helpers.rl:reward", f"{__name__}:brief", "--reward-weights", "1", "0.1"]
    assert main([*command, *both, "--multi-objective-aggregation", "normalize_then_sum"]) == 0
    assert "rewards/brief/mean" in capsys.readouterr().out
    early = [*command, "--model", "nobody/nowhere"]  # refused before a model is loaded
    assert main([*early, "--grader", "helpers.rl:reward", "--reward-weights", "1", "1", "--resume"]) == 2
    assert "reward_weights: expected one for each of 1 reward functions" in capsys.readouterr().err
    assert main([*command, "--multi-objective-aggregation", "normalize_then_sum", "--resume"]) == 2
    assert "--multi-objective-aggregation: has no effect with one --grader" in capsys.readouterr().err
