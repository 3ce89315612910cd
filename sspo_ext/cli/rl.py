# SPDX-License-Identifier: Apache-2.0
"""`sspo-ext rl`: SSPO on files of prompts and answers. Imports nothing heavy until it runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import (
    REPEATED,
    add_loading,
    add_model,
    add_optimisation,
    add_probe,
    add_prompts,
    add_route,
    add_running,
    check_effect,
    check_training_effect,
    positive,
    setting,
)
from .dry_run import print_prompts
from .training import checkpoint_of, comparison, load, lora_of, train_and_save, training_arguments

DESCRIPTION = """\
Train a causal language model by SSPO on prompts with answers.
The model completes each prompt several times. A grader rewards each completion
by its answer. A probe values each step by how well the model answers after it.
The loss weighs each token by the advantages from both."""

EXAMPLE = "sspo-ext rl --model MODEL --data problems.jsonl --grader exact --output-dir out"

_METRICS = ("accuracy", "reward", "completions/mean_length", "completions/clipped_ratio", "steps/mean")

# Options that SSPOConfig has under the same names, beside those of `training_arguments`.
_SAME = (
    "num_generations max_completion_length temperature top_p top_k rollout_engine rollout_batch_size special_tokens "
    "split_by probe probe_turn probe_engine gamma lam baseline reward_weights multi_objective_aggregation "
    "mask_truncated_completions combine step_scale scale_advantages min_signal epsilon epsilon_high kl_estimator "
    "entropy_coef aggregation num_iterations vllm_importance_sampling_correction vllm_importance_sampling_mode "
    "vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min vllm_importance_sampling_length_normalize"
).split()


_MODES = tuple(f"{level}_{bound}" for level in ("token", "step", "sequence") for bound in ("truncate", "mask"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sspo-ext rl`."""
    add_model(parser)
    add = parser.add_argument
    add(
        "--data", required=True, nargs="+", metavar="JSONL",
        help="training rows with prompt (a text or chat messages) and answer",
    )  # fmt: skip
    add("--eval-data", nargs="+", metavar="JSONL", help="held-out rows, completed greedily before and after training")
    add(
        "--grader", nargs="+", default=["exact"], metavar="NAME",
        help="what rewards a completion: exact, exact:MARKER, math-verify, reasoning-gym or module:function (default: "
        "exact). Of several the first says whether the answer is right",
    )  # fmt: skip
    add("--reward-weights", nargs="+", type=float, metavar="WEIGHT", help="weight of each grader (default: 1 each)")
    add("--output-dir", required=True, metavar="DIR", help="folder for checkpoints, the trained model and progress.png")
    add(
        "--resume", action="store_true", help="continue from the newest whole checkpoint in --output-dir"
    )  # fmt: skip
    _add_rollouts(parser)
    _add_advantages(parser)
    _add_loss(parser)
    _add_correction(parser)
    add_optimisation(
        parser, unit="completions", lr=1e-6, lr_scheduler="constant_with_warmup", batch_size=8, eval_batch_size=32,
        eval_batch="rows completed at once in an evaluation, on each device",
    )  # fmt: skip
    add_running(parser, logging_steps=1)
    add_loading(parser)


def _add_rollouts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("rollouts")
    add = group.add_argument
    add("--num-generations", type=positive, default=8, help="completions of each prompt")
    add(
        "--max-completion-length", type=positive, default=256,
        help="most tokens of a completion; a completion that reaches it earns nothing",
    )  # fmt: skip
    add("--temperature", type=float, default=1.0, help="temperature of sampling and of the loss")
    add(
        "--top-p", type=float, default=1.0,
        help="nucleus sampling; the loss has the log-probs of the kept tokens, if the engine reports them",
    )  # fmt: skip
    add("--top-k", type=int, default=0, help="sample from the k most probable tokens; 0: from all")
    add_prompts(group)
    add(
        "--rollout-engine", default="auto", choices=("auto", "compact", "generate", "vllm", "vllm_server"),
        help="what completes the prompts. compact: a loop that reads a prompt once and drops finished completions; "
        "generate: transformers; auto: compact where the model allows it, else generate; vllm: vLLM beside the model; "
        "vllm_server: a vLLM server on other GPUs",
    )  # fmt: skip
    add("--rollout-batch-size", type=positive, help="completions sampled at once, on each device (default: all)")
    add(
        "--rollout-option", type=setting, **REPEATED,
        help="option of vLLM, such as gpu_memory_utilization=0.4, or of its server, such as url=http://HOST:8000; "
        "repeatable",
    )  # fmt: skip


def _add_advantages(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("steps, values, advantages")
    add = group.add_argument
    add(
        "--split-by", default="newline",
        help="where a completion is split into steps: newline, blank_line, or a regular expression",
    )  # fmt: skip
    add_probe(group)
    add(
        "--probe-option", type=setting, **REPEATED,
        help="option of the probe, such as mode=graded, num_samples=5, reduce=mean or engine=packed; repeatable",
    )  # fmt: skip
    add(
        "--probe-engine", default="policy", choices=("policy", "rollout"),
        help="what is asked for values. policy: the model; rollout: the rollout engine, if it is vLLM",
    )  # fmt: skip
    add("--gamma", type=float, default=0.9, help="discount per step; below 1 it makes reasoning short")
    add("--lam", type=float, default=0.9, help="lambda of GAE over steps; 0: a step's advantage is its own progress")
    add(
        "--baseline", default="rloo",
        help="baseline of the rewards: rloo, grpo, dr_grpo, reinforce, reinforce++ or reinforce++_baseline",
    )  # fmt: skip
    add(
        "--multi-objective-aggregation", default="sum_then_normalize",
        choices=("sum_then_normalize", "normalize_then_sum"),
        help="of several graders: compare the sum of their rewards, or sum what each of them says by itself",
    )  # fmt: skip
    add(
        "--mask-truncated-completions", action="store_true",
        help="leave completions that reach --max-completion-length out of the loss",
    )  # fmt: skip
    add(
        "--combine", default="add", choices=("add", "replace", "outcome"),
        help="how the step advantages are used. add: added to the outcome's advantage; replace: instead of it; "
        "outcome: not at all, and nothing is probed",
    )  # fmt: skip
    add("--step-scale", type=float, default=1.0, help="weight of the step advantages beside the outcome's advantage")
    add(
        "--scale-advantages", action=argparse.BooleanOptionalAction, default=True,
        help="divide both kinds of advantages, each by its standard deviation over the update",
    )  # fmt: skip
    add(
        "--min-signal", type=float, default=0.01,
        help="step advantages whose spread is below this, on the scale of the rewards, are 0",
    )  # fmt: skip


def _bound(text: str) -> float | None:
    """A number, or none."""
    return None if text == "none" else float(text)


def _add_correction(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("importance weights of rollouts")
    add, name = group.add_argument, "--vllm-importance-sampling"
    add(
        f"{name}-correction", action=argparse.BooleanOptionalAction,
        help="weigh completions by the trainer's probability over the engine's (default: with vLLM)",
    )  # fmt: skip
    add(
        f"{name}-mode", default="sequence_mask", choices=_MODES,
        help="whose ratio it is, and whether one out of bounds is cut or counts nothing",
    )  # fmt: skip
    add(f"{name}-clip-max", type=_bound, default=3.0, help="upper bound of the ratio, or none")
    add(f"{name}-clip-min", type=_bound, help="lower bound of the ratio, or none")
    add(
        f"{name}-length-normalize", action=argparse.BooleanOptionalAction, default=False,
        help="the ratio of a step or sequence is the geometric mean of its tokens' ratios",
    )  # fmt: skip


def _add_loss(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("loss")
    add = group.add_argument
    add("--loss-type", default="reinforce", help="reinforce, ppo or cispo")
    add(
        "--loss-option", type=setting, **REPEATED,
        help="option of the loss, such as delta=4, or importance_sampling_level=sequence (GSPO); repeatable",
    )  # fmt: skip
    add("--epsilon", type=float, help="lower clip range of the ratio (default: the loss's own)")
    add("--epsilon-high", type=float, help="upper clip range of the ratio (default: the loss's own)")
    add("--beta", type=float, default=0.0, help="weight of the KL to the initial model; 0: no reference is kept")
    add("--kl-estimator", default="k3", choices=("k1", "k2", "k3"), help="estimator of that KL")
    add("--entropy-coef", type=float, default=0.0, help="weight of the entropy bonus")
    add(
        "--aggregation", default="token", choices=("token", "step", "sequence", "sum"),
        help="over what the token losses are averaged; sum: they are added",
    )  # fmt: skip
    add("--num-iterations", type=positive, default=1, help="updates on each batch of rollouts")
    add_route(group)


def run(options: argparse.Namespace) -> None:
    """Train, evaluate before and after, save the model and progress.png."""
    from ..data.graders import load_grader
    from ..data.prompts import load_prompt_rows
    from ..data.rewards import RewardFunctions

    # Cheap checks come first: options, folder, rows, grader, arguments, then the model.
    _check_options(options)
    checkpoint, lora = checkpoint_of(options), lora_of(options)
    by_text = any(name.partition(":")[0] in ("exact", "math-verify") for name in options.grader)
    probed = options.combine != "outcome" and dict(options.probe_option).get("mode", "likelihood") == "likelihood"
    rows = load_prompt_rows(options.data, by_text or probed)
    held_out = load_prompt_rows(options.eval_data, by_text) if options.eval_data else None

    from transformers import set_seed

    from ..train.models import adapter_base, load_tokenizer
    from ..train.sspo_config import SSPOConfig
    from ..train.sspo_trainer import SSPOTrainer

    graders = [load_grader(name) for name in options.grader]
    RewardFunctions(graders, options.reward_weights)  # refuses weights that do not fit
    # vLLM is given the weights with the adapter merged, and needs the model that they fit
    rollout_options = (
        {"model": adapter_base(options.model) or options.model} if options.rollout_engine == "vllm" else {}
    )
    args = SSPOConfig(
        **training_arguments(options, evaluated=held_out is not None),
        **{name: getattr(options, name) for name in _SAME},
        loss_options=dict(options.loss_option) or None,
        rollout_options={**rollout_options, **dict(options.rollout_option)} or None,
        chat_template_kwargs=dict(options.chat_template_option) or None,
        probe_end=options.probe_end or "",
        probe_options=dict(options.probe_option) or None,
    )
    if options.dry_run:
        tokenizer = load_tokenizer(options.model, trust_remote_code=options.trust_remote_code)
        print_prompts(rows, args, tokenizer)
        return
    model, tokenizer = load(options)
    set_seed(options.seed)
    trainer = SSPOTrainer(model, args, graders, rows, held_out, processing_class=tokenizer, peft_config=lora)
    evaluations = train_and_save(trainer, options, checkpoint, evaluated=held_out is not None)
    if evaluations is None or not trainer.is_world_process_zero():
        return
    if evaluations:
        print("\n" + comparison("held-out, greedy", _METRICS, *evaluations))
    _draw(trainer.state.log_history, Path(options.output_dir) / "progress.png")
    print(f"\nsaved to {options.output_dir}")


def _check_options(options: argparse.Namespace) -> None:
    """ValueError for options that have no effect beside the others."""
    check_training_effect(options)
    if not options.eval_data:
        check_effect(options, "eval_batch_size", "without --eval-data")
    if len(options.grader) == 1:
        check_effect(options, "multi_objective_aggregation", "with one --grader")
    if not options.beta:
        check_effect(options, "kl_estimator", "without --beta")
    if options.combine == "outcome":
        names = "probe probe_end probe_turn probe_option probe_engine gamma lam step_scale min_signal"
        check_effect(options, names, "with --combine outcome, which probes nothing")


def _draw(log_history: list[dict], path: Path) -> None:
    from ..train.progress import curves, draw_progress

    try:
        draw_progress({"training": curves(log_history)}, path)
    except ImportError as error:
        print(f"\nno {path.name}: {error}; install it with: pip install matplotlib")
